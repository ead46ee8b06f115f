"""What a planned index costs: operations, bytes, hours and money, each as a line that shows its arithmetic.

What belongs here: sums and products over shapes, rates and prices. What does not: which SAEs there are and which of them
share a pass (`planning.py`), or where the rates come from (`rates.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from scopeatlas.activations.memory import BYTES_PER_NONZERO, PassPlan
from scopeatlas.listings import ModelShape
from scopeatlas.rates import Rates
from scopeatlas.storage.files import human_bytes

LISTED = 64
"""A plan of more SAEs than this does not name each."""


@dataclass(frozen=True)
class Prices:
    """In US dollars. usd_per_hour: of the machine. llm_features: at most so many features of each SAE are explained by an
    LLM, and judged, with llm_tokens each; usd_per_million: of those tokens."""

    usd_per_hour: float | None = None
    llm_features: int = 100
    llm_tokens: int = 0
    usd_per_million: float | None = None


@dataclass(frozen=True)
class SiteCost:
    """The SAEs of one site of a release. sizes: how many there are of each (features, bytes of weights). l0: the sum of
    their active features a token."""

    site: str
    d_in: int
    sizes: Mapping[tuple[int, int], int]
    l0: float
    tokens: int

    @property
    def saes(self) -> int:
        return sum(self.sizes.values())

    @property
    def features(self) -> int:
        return sum(features * count for (features, _), count in self.sizes.items())

    @property
    def weight_bytes(self) -> int:
        return sum(size * count for (_, size), count in self.sizes.items())

    @property
    def encoder_flop(self) -> int:
        """A multiplication and an addition for each input of each feature: every layer of a multi-layer SAE reads its own."""
        return 2 * self.d_in * self.features * self.tokens

    @property
    def nonzeros(self) -> int:
        return int(self.l0 * self.tokens)

    def explained(self, most: int) -> int:
        """Features asked about if at most so many of each SAE are."""
        return sum(min(features, most) * count for (features, _), count in self.sizes.items())

    def lines(self) -> Iterator[str]:
        widths: Counter[int] = Counter()
        for (width, _), count in self.sizes.items():
            widths[width] += count
        features = " + ".join(f"{count:,} x {width:,}" for width, count in sorted(widths.items()))
        weights = " + ".join(f"{count:,} x {size:,}" for (_, size), count in sorted(self.sizes.items()))
        yield f"  {self.site}: {self.saes:,} SAEs: {features} = {self.features:,} features, L0 {self.l0:,.0f} in all"
        yield f"    weights {weights} = {_bytes(self.weight_bytes)}"
        yield (
            f"    encoders 2 x {self.d_in:,} x {self.features:,} x {self.tokens:,} tokens = {_big(self.encoder_flop)} FLOP; "
            f"non-zeros {self.l0:,.0f} x {self.tokens:,} = {_big(self.nonzeros)}"
        )


@dataclass(frozen=True)
class ReleaseCost:
    """One release. model: None where its shape is not known. depths: of each pass of the subject model over the corpus, how
    many decoder layers it runs, as it stops after its last site."""

    name: str
    sites: Sequence[SiteCost]
    model: ModelShape | None
    depths: Sequence[int]
    tokens: int
    context_length: int

    @property
    def lm_flop(self) -> int:
        return 0 if self.model is None else sum(self.depths) * self.tokens * self.model.layer_flop(self.context_length)

    def lines(self) -> Iterator[str]:
        yield f"{self.name}:"
        for site in self.sites:
            yield from site.lines()
        layers = sum(self.depths)
        passes = f"{len(self.depths):,} passes to their last sites run {layers:,} layers in all"
        if self.model is None:
            yield f"  language model: {passes}; no operations without its shape: name it with --subject"
            return
        layer = self.model.layer_flop(self.context_length)
        yield (
            f"  language model: a layer 2 x {self.model.layer_weights:,} weights + 4 x {self.model.attention:,} x "
            f"{self.context_length:,} (attention) = {layer:,} FLOP a token; {passes}; "
            f"{layers:,} x {self.tokens:,} tokens x {layer:,} = {_big(self.lm_flop)} FLOP"
        )


@dataclass(frozen=True)
class Step:
    """Something that takes time: units of work, in `parts` that add up, at `rate` units a second."""

    name: str
    parts: Sequence[float]
    unit: str
    rate: float | None

    @property
    def amount(self) -> float:
        return sum(self.parts)

    @property
    def seconds(self) -> float | None:
        return None if self.rate is None else self.amount / self.rate

    def line(self) -> str:
        total = f"  {self.name}: {_sum(self.parts)} {self.unit}"
        if self.rate is None or self.seconds is None:
            return f"{total}, at a rate that was not measured"
        work = f"{total}; {_big(self.amount)} {self.unit}" if len(self.parts) > 1 else total
        return f"{work} / {_big(self.rate)} a second = {_big(self.seconds)} s = {self.seconds / 3600:,.2f} h"


@dataclass(frozen=True)
class Plan:
    """What releases would cost together. memory: which of their SAEs share a pass, and what they need in it."""

    releases: Sequence[ReleaseCost]
    memory: PassPlan
    rates: Rates = Rates()
    prices: Prices = Prices()

    def by_release(self, number: Callable[[SiteCost], int]) -> list[int]:
        """A number that sites have, summed over those of each release."""
        return [sum(map(number, release.sites)) for release in self.releases]

    def total(self, number: Callable[[SiteCost], int]) -> int:
        """The same over all of them."""
        return sum(self.by_release(number))

    @property
    def explained(self) -> int:
        """Features that an LLM is asked about."""
        return self.total(lambda site: site.explained(self.prices.llm_features))

    def steps(self) -> list[Step]:
        """Everything that takes time on the machine that the rates are of."""
        features, nonzeros, rates = [self.total(_features)], [self.total(_nonzeros)], self.rates
        encoders = self.by_release(lambda site: site.encoder_flop)
        return [
            Step("language model", [release.lm_flop for release in self.releases], "FLOP", rates.lm_flop),
            Step("encoders", encoders, "FLOP", rates.encoder_flop),
            Step("the rest of caching", nonzeros, "non-zeros", rates.cached_nonzeros),
            Step("sketches", nonzeros, "non-zeros", rates.sketched_nonzeros),
            Step("examples", features, "features", rates.example_features),
            Step("labels, scores and index", features, "features", rates.labelled_features),
        ]

    @property
    def hours(self) -> float | None:
        """Of the steps whose rate was measured, one after the other; None where a product's was not, or its size is unknown."""
        seconds = [step.seconds for step in self.steps()]
        if None in seconds[:2] or any(release.model is None for release in self.releases):
            return None
        return sum(s for s in seconds if s is not None) / 3600

    @property
    def usd(self) -> dict[str, float]:
        """What the machine and the LLM cost, as far as there are prices."""
        costs = {}
        if self.hours is not None and self.prices.usd_per_hour is not None:
            costs["machine"] = self.hours * self.prices.usd_per_hour
        if self.prices.llm_tokens and self.prices.usd_per_million is not None:
            costs["llm"] = self.explained * self.prices.llm_tokens * self.prices.usd_per_million / 1e6
        return costs

    def lines(self) -> Iterator[str]:
        """The plan as people read it: every release, and the sums."""
        yield from self._memory_lines()
        for release in self.releases:
            yield from release.lines()
        yield "all together:"
        yield from self._disk_lines()
        yield from self._hour_lines()
        yield from self._money_lines()

    def _memory_lines(self) -> Iterator[str]:
        """All of the memory plan, or of a long one its summary, and some of what is refused."""
        lines = list(self.memory.lines())
        if len(self.memory.footprints) <= LISTED:
            yield from lines
            return
        yield f"{lines[0]}; --json lists each"
        refused = [f"  left out: {sae}: {reason}" for sae, reason in self.memory.refused.items()]
        yield from refused[:3]
        if len(refused) > 3:
            yield f"  left out: {len(refused) - 3:,} more, for like reasons"

    def _disk_lines(self) -> Iterator[str]:
        features, nonzeros = self.total(_features), self.total(_nonzeros)
        weights = self.by_release(lambda site: site.weight_bytes)
        saes = self.total(lambda site: site.saes)
        yield f"  {saes:,} SAEs, {_sum(self.by_release(_features))} features, {_sum(self.by_release(_nonzeros))} non-zeros"
        yield f"  download: {_sum(weights)} bytes of weights = {human_bytes(sum(weights))}"
        per, whence = self.rates.bytes_per_nonzero, "measured"
        if per is None:
            per, whence = float(BYTES_PER_NONZERO), "assumed"
        activations = nonzeros * per
        yield f"  activations, until pruned: {_big(nonzeros)} non-zeros x {per:.2f} bytes ({whence}) = {_bytes(activations)}"
        for name, size in (("examples", self.rates.example_bytes), ("labels, scores and index", self.rates.index_bytes)):
            if size is None:
                yield f"  {name}: {features:,} features, of a size that was not measured"
            else:
                yield f"  {name}: {features:,} features x {size:,.0f} bytes = {_bytes(features * size)}"

    def _hour_lines(self) -> Iterator[str]:
        if self.rates == Rates():
            yield "no hours: no rates were measured on this machine; measure them with python -m bench.rates, or give a file with --rates"
            yield from (step.line() for step in self.steps()[:2])
            return
        yield f"hours, at the rates of {self.rates.machine or 'the file given'}{self.rates.subject and f' on {self.rates.subject}'}:"
        yield from (step.line() for step in self.steps())
        if self.hours is None:
            yield "  no sum: the language model's operations or one of the two rates are not known"
        else:
            hours = [step.seconds / 3600 for step in self.steps() if step.seconds is not None]
            total = f"{' + '.join(f'{h:,.2f} h' for h in hours)} = {self.hours:,.2f} h"
            without = ", without what was not measured" if len(hours) < len(self.steps()) else ""
            yield f"  one after the other on one such machine: {total}{without}"

    def _money_lines(self) -> Iterator[str]:
        usd, prices = self.usd, self.prices
        if "machine" in usd:
            yield f"machine: {self.hours:,.2f} hours x ${prices.usd_per_hour:,.2f} = ${usd['machine']:,.2f}"
        if "llm" in usd:
            yield (
                f"LLM: {self.explained:,} features (at most {prices.llm_features:,} of each SAE) x {prices.llm_tokens:,} tokens "
                f"x ${prices.usd_per_million:,.2f} / 1,000,000 = ${usd['llm']:,.2f}"
            )
        if len(usd) > 1:
            yield f"money: {' + '.join(f'${cost:,.2f}' for cost in usd.values())} = ${sum(usd.values()):,.2f}"

    def as_dict(self) -> dict[str, object]:
        """The same for machines."""
        sites = ("saes", "features", "weight_bytes", "l0", "encoder_flop", "nonzeros")
        memory = ("device", "available", "batch_tokens", "chunks", "batch", "refused")
        return {
            **{name: getattr(self.memory, name) for name in memory},
            "footprints": {
                name: vars(f) | {"sites": {str(site): d for site, d in f.sites.items()}, "disk": self.memory.disk[name]}
                for name, f in self.memory.footprints.items()
            },
            "releases": [
                {"name": r.name, "depths": list(r.depths), "lm_flop": r.lm_flop}
                | {"sites": [{"site": s.site, "d_in": s.d_in} | {n: getattr(s, n) for n in sites} for s in r.sites]}
                for r in self.releases
            ],
            "steps": [vars(step) | {"amount": step.amount, "seconds": step.seconds} for step in self.steps()],
            "hours": self.hours,
            "usd": self.usd,
        }


def _features(site: SiteCost) -> int:
    return site.features


def _nonzeros(site: SiteCost) -> int:
    return site.nonzeros


def _big(value: float) -> str:
    """2.273e17, 38,997 or 50: four digits, and no power where a person needs none."""
    if value >= 1e6:
        mantissa, power = f"{value:.3e}".split("e+")
        return f"{mantissa}e{int(power)}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _bytes(count: float) -> str:
    return f"{_big(count)} bytes = {human_bytes(int(count))}"


def _sum(values: Sequence[float]) -> str:
    """a + b = c; a single number alone."""
    return f"{' + '.join(map(_big, values))} = {_big(sum(values))}" if len(values) > 1 else _big(sum(values))
