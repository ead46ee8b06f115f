"""`SparseDictionary`: what every SAE and transcoder becomes once loaded, and how it encodes and decodes.

What belongs here: the arithmetic and the checks that hold for any format. What does not: file formats (one module
each) or finding them on disk (`releases.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

Kind = Literal["sae", "transcoder"]

TILE_BYTES = 256 << 20
"""Pre-activations are computed in feature tiles of at most this many bytes, so that no width needs more memory."""

DECODER_NORM_TOLERANCE = 0.02


@dataclass(frozen=True)
class SparseActivations:
    """Non-zero activations of a batch of T tokens, sorted by token, then feature. Three columns of equal length n.

    token: int64 [n] in [0, T). feature: int64 [n]. value: float32 [n], positive.
    """

    token: "torch.Tensor"
    feature: "torch.Tensor"
    value: "torch.Tensor"
    tokens: int


@dataclass(frozen=True)
class SparseDictionary:
    """A sparse dictionary in float32, rows and columns in the convention `x @ W`.

    w_enc: [d_in, F]. b_enc, threshold: [F]. w_dec: [F, d_out]. b_dec: [d_out]. skip: [d_in, d_out] or None.
    JumpReLU (Rajamanoharan et al. 2024): pre = x @ w_enc + b_enc; f = relu(pre) where pre > threshold;
    y = f @ w_dec + b_dec (+ x @ skip).
    """

    kind: Kind
    site_in: Site
    site_out: Site
    model_name: str
    target_l0: float | None
    w_enc: "torch.Tensor"
    b_enc: "torch.Tensor"
    threshold: "torch.Tensor"
    w_dec: "torch.Tensor"
    b_dec: "torch.Tensor"
    skip: "torch.Tensor | None" = None

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.w_dec.shape[1]

    @property
    def width(self) -> int:
        return self.w_enc.shape[1]

    @property
    def value_scale(self) -> float:
        """A power of two, of the SAE alone, that brings activations into the middle of float16's range.

        A value is stored as float16(value / value_scale): the median threshold lands near 2**-3, which leaves a
        factor of 2**18 above it before float16 ends and 2**11 below before precision falls.
        """
        import torch

        positive = self.threshold[self.threshold > 0]
        if not len(positive):
            return 1.0
        return float(2.0 ** (torch.round(torch.log2(positive.median())) + 3))

    def to(self, device: "torch.device") -> "SparseDictionary":
        """The same dictionary on `device`."""
        from dataclasses import replace

        names = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, skip=None if self.skip is None else self.skip.to(device))

    def feature_tiles(self, tokens: int) -> Iterator[slice]:
        """Feature ranges whose pre-activations for `tokens` tokens fit into TILE_BYTES."""
        size = max(1, TILE_BYTES // (4 * max(tokens, 1)))
        for start in range(0, self.width, size):
            yield slice(start, min(start + size, self.width))

    def encode(self, x_td: "torch.Tensor") -> SparseActivations:
        """Activations of `x_td` [tokens, d_in] (any float dtype, computed in float32), never dense beyond one tile."""
        import torch

        x = x_td.float()
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for tile in self.feature_tiles(len(x)):
            pre = torch.addmm(self.b_enc[tile], x, self.w_enc[:, tile])
            token, feature = (pre > self.threshold[tile].clamp(min=0)).nonzero(as_tuple=True)
            found.append((token, feature + tile.start, pre[token, feature]))
        if len(found) == 1:
            return SparseActivations(*found[0], tokens=len(x))
        token, feature, value = (torch.cat(column) for column in zip(*found, strict=True))
        order = torch.argsort(token, stable=True)  # tiles come in feature order, so (token, feature) is kept
        return SparseActivations(token[order], feature[order], value[order], tokens=len(x))

    def decode(self, acts: SparseActivations, x_td: "torch.Tensor | None" = None) -> "torch.Tensor":
        """The reconstruction [tokens, d_out], float32. `x_td` is needed only by a dictionary with an affine skip."""
        import torch

        counts = torch.bincount(acts.token, minlength=acts.tokens)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        y = torch.nn.functional.embedding_bag(acts.feature, self.w_dec, starts[:-1], mode="sum", per_sample_weights=acts.value)
        y = y + self.b_dec
        if self.skip is not None:
            if x_td is None:
                raise ValueError("a dictionary with an affine skip connection decodes from its input too")
            y = y + x_td.float() @ self.skip
        return y

    def dense_activations(self, x_td: "torch.Tensor") -> "torch.Tensor":
        """Activations [tokens, F], dense: for a few tokens only, and as the oracle of `encode` in tests."""
        pre = x_td.float() @ self.w_enc + self.b_enc
        return pre.relu() * (pre > self.threshold)


def validate(dictionary: SparseDictionary, source: str) -> None:
    """Check shapes, finiteness, thresholds and decoder norms. Raises DictionaryError naming `source` and the tensor."""
    d_in, width, d_out = dictionary.d_in, dictionary.width, dictionary.d_out
    expected = {
        "w_enc": (d_in, width),
        "b_enc": (width,),
        "threshold": (width,),
        "w_dec": (width, d_out),
        "b_dec": (d_out,),
        "skip": (d_in, d_out),
    }
    for name, shape in expected.items():
        tensor = getattr(dictionary, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise DictionaryError(f"{source}: {name} has shape {tuple(tensor.shape)}, expected {shape}; download the file again")
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise DictionaryError(f"{source}: {name} holds {bad} value(s) that are NaN or infinite; download the file again")
    if bool((dictionary.threshold < 0).any()):
        raise DictionaryError(
            f"{source}: negative thresholds; a JumpReLU dictionary has none, so the file is damaged or of another kind"
        )
    norms = dictionary.w_dec.norm(dim=1)
    worst = float((norms - 1).abs().max())
    if worst > DECODER_NORM_TOLERANCE:
        raise DictionaryError(
            f"{source}: decoder rows are not unit norm (off by up to {worst:.3g}); w_dec may be transposed or of another format"
        )


def check_fits(dictionary: SparseDictionary, d_model: int, source: str, model_name: str) -> None:
    """Raises DictionaryError if the dictionary cannot read the subject model's activations of size `d_model`."""
    if dictionary.d_in != d_model:
        raise DictionaryError(
            f"{source}: reads activations of size {dictionary.d_in}, but {dictionary.site_in} of {model_name} has {d_model}; "
            f"it was trained on {dictionary.model_name or 'another model'}: set subject.name to that model"
        )
