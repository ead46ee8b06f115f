"""`SparseDictionary`: what every SAE, transcoder, crosscoder and CLT becomes once loaded; how it encodes and decodes.

What belongs here: the arithmetic that holds for any format. What does not: file formats (one module each), the checks
after loading (`validation.py`), or finding dictionaries on disk (`releases.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, overload

from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

Kind = Literal["sae", "transcoder", "crosscoder", "clt"]
InputNorm = Literal["none", "token_norm", "layer_norm"]
MULTI_LAYER: tuple[Kind, ...] = ("crosscoder", "clt")

TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Pre-activations are computed in feature tiles of at most this many bytes, so that no width needs more memory. On a CPU
a tile stays in the cache until it has been compared with its thresholds; a GPU wants few and large ones."""

LAYER_NORM_EPS = 1e-5
VALUE_SCALE_WITHOUT_THRESHOLDS = 16.0


@dataclass(frozen=True)
class SparseActivations:
    """Non-zero activations of a batch of T tokens, sorted by token, then feature. Three columns of equal length n.

    token: int64 [n] in [0, T). feature: int64 [n], layer position * features_per_layer + index. value: float32 [n],
    positive for every activation function but `abstopk`.
    """

    token: "torch.Tensor"
    feature: "torch.Tensor"
    value: "torch.Tensor"
    tokens: int

    def dense(self, width: int) -> "torch.Tensor":
        """The same as [T, width], float32: for a few tokens only."""
        out = self.value.new_zeros((self.tokens, width))
        out[self.token, self.feature] = self.value
        return out


@dataclass(frozen=True)
class Activation:
    """How pre-activations become activations.

    relu: above 0. jumprelu: above the feature's threshold (Rajamanoharan et al. 2024). topk: the k largest of relu(pre)
    of a token (Gao et al. 2024). abstopk: the k largest by absolute value, signs kept. groupmax: features are k
    consecutive groups, the largest of relu(pre) in each. gated: see `LayerWeights.magnitude`.
    """

    function: Literal["relu", "jumprelu", "topk", "abstopk", "groupmax", "gated"]
    k: int | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One encoder layer in the convention `x @ W`, of any float dtype; computed in float32.

    w_enc: [d_in, F]. b_enc: [F]. w_dec: [F, L_out - first_output, d_out], of the outputs from first_output on; nothing is
    written to those before. threshold: [F], or None for 0. skip: [d_in, d_out] or None: added to this layer's own output.
    magnitude: of a gated SAE (Rajamanoharan et al. 2024), scale [F] and shift [F]: the value is pre * scale + shift,
    where pre > 0 and the value is positive.
    """

    w_enc: "torch.Tensor"
    b_enc: "torch.Tensor"
    w_dec: "torch.Tensor"
    threshold: "torch.Tensor | None" = None
    skip: "torch.Tensor | None" = None
    magnitude: "tuple[torch.Tensor, torch.Tensor] | None" = None
    first_output: int = 0

    def rows(self, features: "int | slice") -> "torch.Tensor":
        """Decoder rows [L_out, d_out] of a feature or [n, L_out, d_out] of several, zero before `first_output`."""
        import torch

        return torch.nn.functional.pad(self.w_dec[features], (0, 0, self.first_output, 0))

    def row_tiles(self, size: int) -> "Iterator[torch.Tensor]":
        """All decoder rows in order, [at most `size`, L_out, d_out] at a time."""
        return (self.rows(slice(start, start + size)) for start in range(0, len(self.w_dec), size))

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Every tensor there is, by name."""
        scale, shift = self.magnitude or (None, None)
        named = {"w_enc": self.w_enc, "b_enc": self.b_enc, "w_dec": self.w_dec, "threshold": self.threshold}
        named |= {"skip": self.skip, "magnitude_scale": scale, "magnitude_shift": shift}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: "torch.device", *, decoder: bool = True) -> "LayerWeights":
        """The same in float32 on `device`; without `decoder`, w_dec stays where and as it is."""
        import torch

        def move(tensor: "torch.Tensor | None") -> "torch.Tensor | None":
            return None if tensor is None else tensor.to(device, torch.float32)

        magnitude = self.magnitude and tuple(t.to(device, torch.float32) for t in self.magnitude)
        return LayerWeights(
            move(self.w_enc),  # pyright: ignore[reportArgumentType]
            move(self.b_enc),  # pyright: ignore[reportArgumentType]
            # Contiguous, because a transposed view would be copied whole for every batch that is decoded.
            self.w_dec.to(device, torch.float32).contiguous() if decoder else self.w_dec,
            move(self.threshold),
            move(self.skip),
            magnitude,  # pyright: ignore[reportArgumentType]
            self.first_output,
        )


class LazyLayers(Sequence[LayerWeights]):
    """Layers opened when they are asked for and kept by nobody, so that memory stays at one of them.

    open_layer: gives layer i, best as mapped tensors: then only the decoder rows of features that fire are ever read.
    """

    def __init__(self, open_layer: Callable[[int], LayerWeights], count: int):
        self._open, self._count = open_layer, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyLayers": ...
    def __getitem__(self, index: int | slice) -> "LayerWeights | LazyLayers":
        if isinstance(index, slice):
            places = range(self._count)[index]
            return LazyLayers(lambda i: self._open(places[i]), len(places))
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._open(index % self._count)

    def to(self, device: "torch.device") -> "LazyLayers":
        """Layers whose encoder is moved when opened; the decoder stays mapped, of which only some rows are used."""
        if device.type == "cpu":
            return self
        return LazyLayers(lambda i: self._open(i).to(device, decoder=False), self._count)


@dataclass(frozen=True)
class SparseDictionary:
    """A sparse dictionary: `layers` read `sites_in` one each, and all write `sites_out`.

    pre = norm(x) @ w_enc + b_enc for each layer; y[o] = sum over layers l of f[l] @ w_dec[l][:, o] + b_dec[o], the norm
    undone (+ x[o] @ skip[o]). An SAE or transcoder is the case of one layer. A feature's id is its layer's position
    times `features_per_layer` plus its index there. b_dec: [L_out, d_out]. target_l0: what training aimed at;
    measured_l0: an average the publisher measured. notes: what loading found or mended, one sentence each.
    """

    kind: Kind
    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    model_name: str
    layers: Sequence[LayerWeights]
    b_dec: "torch.Tensor"
    activation: Activation
    norm: InputNorm = "none"
    target_l0: float | None = None
    measured_l0: float | None = None
    family: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def _first(self) -> tuple[int, int, int]:
        """d_in, features per layer, d_out, read off the first layer once."""
        layer = self.layers[0]
        return layer.w_enc.shape[0], layer.w_enc.shape[1], layer.w_dec.shape[-1]

    @property
    def d_in(self) -> int:
        return self._first[0]

    @property
    def features_per_layer(self) -> int:
        return self._first[1]

    @property
    def d_out(self) -> int:
        return self._first[2]

    @property
    def width(self) -> int:
        """Features in all layers together."""
        return self.features_per_layer * len(self.layers)

    @property
    def is_multi_layer(self) -> bool:
        return self.kind in MULTI_LAYER

    @property
    def sites(self) -> frozenset[Site]:
        """Every site that the dictionary reads or writes."""
        return frozenset(self.sites_in + self.sites_out)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as they are stored."""
        return sum(layer.nbytes for layer in self.layers) + self.b_dec.nbytes

    @property
    def is_lazy(self) -> bool:
        """Whether the layers are streamed, one in memory at a time."""
        return isinstance(self.layers, LazyLayers)

    def place(self, feature: int) -> tuple[int, int]:
        """Position of a feature's encoder layer, and its index there."""
        return divmod(feature, self.features_per_layer)

    def steering_vector(self, feature: int, output: int = 0) -> "torch.Tensor":
        """What one unit of a feature writes at output site `output`: float32 [d_out]."""
        layer, index = self.place(feature)
        return self.layers[layer].rows(index)[output].float()

    def reading_direction(self, feature: int) -> "torch.Tensor":
        """What a feature looks for at its input site: its encoder column, float32 [d_in]."""
        layer, index = self.place(feature)
        return self.layers[layer].w_enc[:, index].float()

    @cached_property
    def value_scale(self) -> float:
        """A power of two, of the dictionary alone, that brings activations into the middle of float16's range.

        A value is stored as float16(value / value_scale): the median threshold lands near 2**-3, which leaves a
        factor of 2**18 above it before float16 ends and 2**11 below before precision falls.
        """
        import torch

        thresholds = [layer.threshold.float() for layer in self.layers if layer.threshold is not None]
        positive = torch.cat(thresholds) if thresholds else torch.zeros(0)
        positive = positive[positive > 0]
        if not len(positive):
            return VALUE_SCALE_WITHOUT_THRESHOLDS
        return float(2.0 ** (torch.round(torch.log2(positive.median())) + 3))

    def to(self, device: "torch.device") -> "SparseDictionary":
        """The same dictionary, its weights in float32 on `device`; streamed layers go there as they are opened."""
        layers = self.layers.to(device) if isinstance(self.layers, LazyLayers) else tuple(w.to(device) for w in self.layers)
        return replace(self, layers=layers, b_dec=self.b_dec.float().to(device))

    @property
    def plausible_l0(self) -> float:
        """More active features a token than this mean that the dictionary is misread, and that results would not fit memory."""
        return max(30 * (self.measured_l0 or self.target_l0 or 0), 0.02 * self.width, 1000)

    def encode(self, x: "torch.Tensor | Sequence[torch.Tensor]", *, max_l0: float | None = None) -> SparseActivations:
        """Activations of x, one [tokens, d_in] per input site (any float dtype), never dense beyond one tile.

        Raises DictionaryError as soon as more than `max_l0` features fire on the average token.
        """
        import torch

        inputs = _as_sequence(x)
        most = None if max_l0 is None else int(max_l0 * max(len(inputs[0]), 1))
        token, feature, value = [], [], []
        for position, (x_td, layer) in enumerate(zip(inputs, self.layers, strict=True)):
            t, f, v = _encode_layer(_normalised(x_td.float(), self.norm), layer, self.activation, most)
            token.append(t)
            feature.append(f + position * self.features_per_layer)
            value.append(v)
        return SparseActivations(*_by_token(torch.cat(token), torch.cat(feature), torch.cat(value)), tokens=len(inputs[0]))

    def decode(self, acts: SparseActivations, x: "torch.Tensor | Sequence[torch.Tensor] | None" = None) -> "torch.Tensor":
        """The reconstruction [tokens, d_out], float32; of a multi-layer kind [tokens, L_out, d_out].

        x, the encoder's input, is needed only by a dictionary with an affine skip or an input norm, which is undone.
        """
        shape = (acts.tokens, len(self.sites_out), self.d_out)
        y = self.b_dec.float().expand(shape).clone()
        inputs = None if x is None else _as_sequence(x)
        for position, layer in enumerate(self.layers):
            _add_layer(y, layer, _of_layer(acts, position * self.features_per_layer, self.features_per_layer, len(self.layers)))
        if self.norm != "none":
            y = _restored(y, _needed(inputs, "an input norm")[0].float(), self.norm)
        for position, layer in enumerate(self.layers):
            if layer.skip is None:
                break  # all layers have one, or none has
            x_td = _needed(inputs, "an affine skip connection")[position].float()
            y[:, position] += x_td @ layer.skip.float()
        return y if self.is_multi_layer else y[:, 0]


def fold_b_dec(b_enc: "torch.Tensor", b_dec: "torch.Tensor", w_enc: "torch.Tensor") -> "torch.Tensor":
    """b_enc of an encoder that subtracts b_dec [d_in] from its input: (x - b_dec) @ W + b = x @ W + (b - b_dec @ W)."""
    return (b_enc.double() - b_dec.double() @ w_enc.double()).float()


def _as_sequence(x: "torch.Tensor | Sequence[torch.Tensor]") -> "Sequence[torch.Tensor]":
    import torch

    return [x] if isinstance(x, torch.Tensor) else x


def _needed(inputs: "Sequence[torch.Tensor] | None", why: str) -> "Sequence[torch.Tensor]":
    if inputs is None:
        raise ValueError(f"a dictionary with {why} decodes from its input too")
    return inputs


def _normalised(x: "torch.Tensor", norm: InputNorm) -> "torch.Tensor":
    if norm == "token_norm":
        return x * (x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True))
    if norm == "layer_norm":
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + LAYER_NORM_EPS)
    return x


def _restored(y_tod: "torch.Tensor", x: "torch.Tensor", norm: InputNorm) -> "torch.Tensor":
    """y [tokens, outputs, d] with the norm of its input x [tokens, d] undone."""
    if norm == "token_norm":
        return y_tod * (x.norm(dim=1) / x.shape[1] ** 0.5)[:, None, None]
    # SAELens and OpenAI add the epsilon when they divide, and not when they multiply back.
    return y_tod * x.std(1)[:, None, None] + x.mean(1)[:, None, None]


Found = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def _encode_layer(x: "torch.Tensor", layer: LayerWeights, activation: Activation, most: int | None) -> Found:
    """Tokens, feature indices and values of the non-zero activations of one layer, at most `most`, sorted by (token, feature)."""
    if activation.function in ("topk", "abstopk"):
        return _largest(x, layer, activation)
    import torch

    group = layer.w_enc.shape[1] // (activation.k or 1) if activation.function == "groupmax" else 1
    found: list[Found] = []
    count = 0
    for tile, pre in _tiles(x, layer, multiple_of=group):
        which = None
        if activation.function == "groupmax":
            values, which = pre.unflatten(1, (-1, group)).max(2)
            fires = values > 0
        elif layer.magnitude is not None:
            scale, shift = (part[tile].float() for part in layer.magnitude)
            values = pre * scale + shift
            fires = (pre > 0) & (values > 0)
        else:
            values = pre
            fires = pre > (0.0 if layer.threshold is None else layer.threshold[tile].float().clamp(min=0))
        count += int(torch.count_nonzero(fires))
        if most is not None and count > most:  # before room is taken for them
            raise DictionaryError(
                f"more than {most / max(len(x), 1):,.0f} features fire on the average token: the SAE is read at a wrong site "
                "or normalisation, or of another subject model"
            )
        token, feature, value = _where(fires, values)
        if which is not None:
            feature = feature * group + which[token, feature]
        found.append((token, feature + tile.start, value))
    if len(found) == 1:
        return found[0]
    token, feature, value = (torch.cat(column) for column in zip(*found, strict=True))
    return _by_token(token, feature, value)


def _where(fires: "torch.Tensor", values: "torch.Tensor") -> Found:
    """Rows, columns and values [n] of the places of a tile where `fires` holds, in order."""
    import torch

    place = fires.flatten().nonzero().squeeze(1)  # one index to find and to gather by, not two
    row = torch.div(place, fires.shape[1], rounding_mode="floor")
    return row, place - row * fires.shape[1], values.flatten()[place]


def _largest(x: "torch.Tensor", layer: LayerWeights, activation: Activation) -> Found:
    """The k largest activations of each token, merged over tiles: after the first, only what exceeds a token's k-th so far
    is looked at."""
    import torch

    assert activation.k is not None
    best, where = x.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    for tile, pre in _tiles(x, layer):
        if activation.function == "topk":
            pre = pre.relu_()
        size = pre.abs() if activation.function == "abstopk" else pre
        if best.shape[1] < activation.k:
            chosen = size.topk(min(activation.k, pre.shape[1]), dim=1).indices
            values = pre.gather(1, chosen)
        else:
            values, chosen = _padded(*_where(size > best.abs().amin(1, keepdim=True), pre), len(x))
        best, where = torch.cat([best, values], 1), torch.cat([where, chosen + tile.start], 1)
        if best.shape[1] > activation.k:
            kept = best.abs().topk(activation.k, dim=1).indices
            best, where = best.gather(1, kept), where.gather(1, kept)
    where, order = where.sort(dim=1)
    best = best.gather(1, order)
    token, slot = (best != 0).nonzero(as_tuple=True)
    return token, where[token, slot], best[token, slot]


def _padded(row: "torch.Tensor", column: "torch.Tensor", value: "torch.Tensor", rows: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Places sorted by row as tables [rows, most in a row]: values, 0 where a row has fewer, and columns."""
    import torch

    counts = torch.bincount(row, minlength=rows)
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = value.new_zeros(rows, int(counts.max()))
    columns = torch.zeros_like(values, dtype=torch.int64)
    values[row, slot], columns[row, slot] = value, column
    return values, columns


def _tiles(x: "torch.Tensor", layer: LayerWeights, *, multiple_of: int = 1) -> Iterator[tuple[slice, "torch.Tensor"]]:
    """Feature ranges and their pre-activations [tokens, features], each of at most TILE_BYTES.

    One buffer serves every tile: what is yielded holds until the next is asked for.
    """
    import torch

    width, tokens = layer.w_enc.shape[1], len(x)
    size = max(1, TILE_BYTES[x.device.type] // (4 * max(tokens, 1)) // multiple_of) * multiple_of
    buffer = x.new_empty(tokens * min(size, width))
    for start in range(0, width, size):
        tile = slice(start, min(start + size, width))
        pre = buffer[: tokens * (tile.stop - start)].view(tokens, tile.stop - start)
        yield tile, torch.addmm(layer.b_enc[tile].float(), x, layer.w_enc[:, tile].float(), out=pre)


def _by_token(token: "torch.Tensor", feature: "torch.Tensor", value: "torch.Tensor") -> Found:
    """Sorted by token; parts come in feature order, and a stable sort keeps it within each token."""
    import torch

    order = torch.argsort(token, stable=True)
    return token[order], feature[order], value[order]


def _of_layer(acts: SparseActivations, first: int, count: int, layers: int) -> SparseActivations:
    """The activations of features first..first+count, numbered from 0."""
    if layers == 1:
        return acts
    mine = (acts.feature >= first) & (acts.feature < first + count)
    return SparseActivations(acts.token[mine], acts.feature[mine] - first, acts.value[mine], acts.tokens)


def _add_layer(y_tod: "torch.Tensor", layer: LayerWeights, acts: SparseActivations) -> None:
    """Add what one layer's features write. Only decoder rows of features that fire are read or moved."""
    import torch

    rows, index = layer.w_dec, acts.feature
    if rows.device != y_tod.device or rows.dtype != torch.float32:
        used, index = index.unique(return_inverse=True)
        rows = rows[used.to(rows.device)].to(y_tod.device, torch.float32)
    counts = torch.bincount(acts.token, minlength=acts.tokens)
    starts = counts.cumsum(0) - counts
    summed = torch.nn.functional.embedding_bag(index, rows.flatten(1), starts, mode="sum", per_sample_weights=acts.value)
    y_tod[:, layer.first_output :] += summed.view(len(y_tod), -1, y_tod.shape[2])
