"""The share of activations that flip (appear or vanish) when the encoder's product is taken at a lower precision.

    .venv/bin/python -m bench.precision --out bench/results/precision

Real Gemma 3 270M residuals (float32) of about 8,000 tokens through the demo's two SAEs; the truth is the product in float64. A tensor core
multiplies rounded inputs exactly and adds in float32, which is what is done here with inputs rounded as it rounds them, so
the figures need no GPU. float32: as the encoder does it. tf32: inputs to 10 bits of mantissa; bf16: to 7; bf16x3: inputs split into two bf16 parts each,
three products (high x high, high x low, low x high). *centred*: the mean activation is taken off the input before it is
rounded and put back through the bias, because a residual stream's constant part is many times its varying one. On a GPU,
`--device cuda` also takes float32 and tf32 products there. One flip in 10,000 is the most that a default may cost.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.machine import machine
from bench.standins import corpus_of, subject_model
from scopeatlas.activations.reading import read_batches
from scopeatlas.dictionaries.releases import find_saes, open_dictionary
from scopeatlas.storage.store import Store

TOKENS = 8192
Rounding = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def truncated_mantissa(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 rounded to nearest even at `bits` of mantissa."""
    drop = 23 - bits
    raw = x.contiguous().view(torch.int32)
    odd = (raw >> drop) & 1
    return (((raw + (1 << (drop - 1)) - 1 + odd) >> drop) << drop).view(torch.float32)


def split_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """bf16x3."""
    xh, wh = truncated_mantissa(x, 7), truncated_mantissa(w, 7)
    xl, wl = truncated_mantissa(x - xh, 7), truncated_mantissa(w - wh, 7)
    return xh @ wh + (xh @ wl + xl @ wh)


PRODUCTS: dict[str, Rounding] = {
    "float32": lambda x, w: x @ w,
    "tf32": lambda x, w: truncated_mantissa(x, 10) @ truncated_mantissa(w, 10),
    "bf16": lambda x, w: truncated_mantissa(x, 7) @ truncated_mantissa(w, 7),
    "bf16x3": split_product,
}


def on_gpu(tf32: bool) -> Rounding:
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return (x.cuda() @ w.cuda()).cpu()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return product


def flips(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, threshold: torch.Tensor, product: Rounding, centre: torch.Tensor):
    """Activations on one side of their threshold in float64 and on the other with `product`, over those that fire in float64."""
    flipped = fired = 0
    for start in range(0, w.shape[1], 1024):
        tile = slice(start, start + 1024)
        truth = x.double() @ w[:, tile].double() + b[tile].double() > threshold[tile].double()
        bias = (b[tile].double() + centre.double() @ w[:, tile].double()).float()
        got = product((x.double() - centre.double()).float(), w[:, tile]) + bias > threshold[tile]
        flipped += int((truth != got).sum())
        fired += int(truth.sum())
    return flipped / fired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", type=Path, default=Path("demo/releases"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="writes OUT.json")
    arguments = parser.parse_args()
    subject = subject_model("cpu")
    products = dict(PRODUCTS)
    if arguments.device == "cuda":
        products |= {"float32 on the GPU": on_gpu(tf32=False), "tf32 on the GPU": on_gpu(tf32=True)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = corpus_of(Store(Path(folder)), subject, TOKENS, shard_bits=0)
        for entry in find_saes(arguments.releases):
            dictionary = open_dictionary(entry)
            site, layer = dictionary.sites_in[0], dictionary.layers[0]
            batches = read_batches(corpus.contexts(corpus.shards[0]), subject, {site})
            x = torch.cat([batch.acts[site].float() for batch in batches])
            for centred in (False, True):
                centre = x[:1024].mean(0) if centred else torch.zeros(x.shape[1])
                for name, product in products.items():
                    share = flips(x, layer.w_enc.float(), layer.b_enc.float(), layer.threshold.float(), product, centre)
                    rows.append({"sae": entry.path, "product": name + (", centred" if centred else ""), "flips": share})
    print("| SAE | product | flips |\n|---|---|---|")
    print("\n".join(f"| {row['sae']} | {row['product']} | {row['flips']:.2e} |" for row in rows))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
