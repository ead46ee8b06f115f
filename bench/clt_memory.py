"""Peak memory of loading, checking, encoding and decoding a cross-layer transcoder of real size, against its shards.

    python -m bench.clt_memory --folder /tmp/clt          # 13 GB: the shapes of gemma-scope-2-270m clt/width_262k
    python -m bench.clt_memory --folder /tmp/clt --features 1456    # a tenth of the features

The weights are random (what is measured does not depend on them); thresholds let about 50 features fire on a token. The
work is done in a process of its own, whose peak is read from the kernel: all of it (VmHWM, mapped file pages included)
and the anonymous part, which is what cannot be given back.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, D_MODEL, FEATURES, TOKENS, PASSES = 18, 640, 14560, 2048, 3
RELEASE, PATH = "gemma-scope-2-270m-pt", "clt/width_262k_l0_medium"


def write_release(folder: Path, features: int) -> Path:
    """The release, shard by shard; one that is there already is used."""
    target = folder / RELEASE / PATH
    target.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rank = torch.tensor(1 - 50 / (LAYERS * features), dtype=torch.float64)
    threshold = float(torch.special.ndtri(rank))  # inputs and encoder columns make pre-activations standard normal
    for layer in range(LAYERS):
        path = target / f"params_layer_{layer}.safetensors"
        if path.exists():
            continue
        w_dec = torch.randn(features, LAYERS, D_MODEL, generator=generator).mul_(0.01)
        w_dec[:, :layer] = 0
        tensors = {
            "w_enc": torch.randn(D_MODEL, features, generator=generator).div_(D_MODEL**0.5),
            "b_enc": torch.zeros(features),
            "threshold": torch.full((features,), threshold),
            "w_dec": w_dec,
            "b_dec": torch.zeros(D_MODEL),
        }
        save_file(tensors, path)
        print(f"wrote {path.name}", flush=True)
    hooks = {
        "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
    }
    config = {"width": LAYERS * features, "model_name": "google/gemma-3-270m", "architecture": "jump_relu", "l0": 50}
    (target / "config.json").write_text(json.dumps(config | hooks | {"affine_connection": False, "type": "clt"}))
    return target


def peaks() -> dict[str, int]:
    """Bytes: peak of everything resident so far, and what is anonymous now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return {name: int(value) * 1024 for name, value in values.items()}


def work(target: Path) -> None:
    """Open, check, encode and decode; prints one JSON line for each step."""
    from scopeatlas.dictionaries.releases import load_folder

    torch.randn(4, 4) @ torch.randn(4, 4)

    def say(step: str, started: float, **more: float) -> None:
        print(json.dumps({"step": step, "seconds": time.monotonic() - started, **peaks(), **more}), flush=True)

    say("torch imported", time.monotonic())
    started = time.monotonic()
    dictionary = load_folder(target)
    say("loaded and checked", started)
    started, active = time.monotonic(), 0
    for number in range(PASSES):
        x = [torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(number * LAYERS + i)) for i in range(LAYERS)]
        acts = dictionary.encode(x)
        active += len(acts.token)
        dictionary.decode(acts, x)
    say("encoded and decoded", started, tokens=PASSES * TOKENS, l0=active / (PASSES * TOKENS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the release is written (and kept)")
    parser.add_argument("--features", type=int, default=FEATURES, help="per layer; the real release has 14,560")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.folder)
        return
    target = write_release(arguments.folder, arguments.features)
    total = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    shard = total / LAYERS
    print(f"release {total / 1e9:.2f} GB, shard {shard / 1e9:.3f} GB")
    command = [sys.executable, "-m", "bench.clt_memory", "--folder", str(target), "--work"]
    base = None
    for line in subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout.splitlines():
        step = json.loads(line)
        base = base or step
        above = step["VmHWM"] - base["VmHWM"]
        print(
            f"{step['step']}: {step['seconds']:.1f} s, peak RSS {step['VmHWM'] / 1e9:.2f} GB ({above / shard:.2f} shards above the start, "
            f"{step['VmHWM'] / total:.3f} of the release), anonymous {step['RssAnon'] / 1e9:.2f} GB"
            + (f", {step['tokens']:,} tokens at L0 {step['l0']:.1f}" if "tokens" in step else "")
        )


if __name__ == "__main__":
    main()
