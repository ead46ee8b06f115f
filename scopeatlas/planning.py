"""What indexing releases would take, before it starts: from names and folders to a plan, by shapes alone.

What belongs here: which SAEs are meant, and their passes. What does not: what fits into memory together
(`activations/memory.py`), what a listed release holds (`listings.py`), or the sums over it all (`costs.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from scopeatlas.activations.memory import Footprint, PassPlan, footprint_of, free_memory, plan_pass
from scopeatlas.costs import Plan, Prices, ReleaseCost, SiteCost
from scopeatlas.dictionaries import formats
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.listings import ModelShape, listed_releases, listed_saes, releases_named, shape_of, shape_of_config
from scopeatlas.rates import Rates
from scopeatlas.storage.uris import Location
from scopeatlas.subject.loading import BATCH_TOKENS, SubjectModel

USUAL_SHARDS = 16
"""Of a corpus, by default (`corpus.shard_bits`: 4)."""
USUAL_RUN = 16
"""SAEs that one run takes together (`saes.per_run`)."""


@dataclass(frozen=True)
class Work:
    """What is asked for. memory_bytes: besides the subject model; None takes what is free on this machine's accelerator, or
    in its memory. site: a glob on the release's own words, such as resid_post*. subject: of folders that name no known one."""

    tokens: int
    context_length: int = 128
    memory_bytes: int | None = None
    per_run: int = USUAL_RUN
    site: str = "*"
    subject: ModelShape | None = None


@dataclass(frozen=True)
class _Candidate:
    """One SAE that may be planned for: its release's name and model, the site in the release's word, its shapes."""

    release: str
    model: str
    site: str
    d_in: int
    footprint: Footprint


def model_shape(name: str) -> ModelShape:
    """The shape of a subject model by name: as the table has it, else from its configuration. Raises SubjectModelError if
    there is none here."""
    return shape_of(name) or shape_of_config(SubjectModel(name).config)


def plan_releases(
    names: Sequence[str], work: Work, *, store: Location, rates: Rates | None = None, prices: Prices | None = None
) -> Plan:
    """The plan of indexing releases on a corpus: each a folder that holds SAEs, or a release known by its name.

    store: where activations of folders must fit beside what is there; a release that is only named is planned for wherever
    there will be room. Formats that can be mapped have no weight read. An SAE that cannot be opened, or does not fit, is
    refused and named. Raises DictionaryError for a name that stands for nothing.
    """
    candidates: dict[str, _Candidate] = {}
    refused: dict[str, str] = {}
    tokens: dict[str, int] = {}
    for place in dict.fromkeys(_place(name) for name in names):
        for sae, found in _found(place):
            if sae in candidates or sae in refused:
                if isinstance(place, str):
                    continue  # names may overlap, as gemma-scope-2 and one of its repos
                sae = f"{place}/{sae}"
            if isinstance(found, str):
                refused[sae] = found
            elif fnmatchcase(found.site, work.site):
                candidates[sae] = found
                tokens[sae] = work.tokens if isinstance(place, Path) else 0
    if not candidates and not refused:
        raise DictionaryError(f"no SAE of {', '.join(names)} has a site '{work.site}'; leave out --site to see which there are")
    device, available = _memory(work)
    releases, plans = [], []
    for release, model in dict.fromkeys((c.release, c.model) for c in candidates.values()):
        its = {sae: c for sae, c in candidates.items() if (c.release, c.model) == (release, model)}
        made = [
            plan_pass(
                {sae: its[sae].footprint for sae in run},
                tokens=tokens,
                batch_tokens=BATCH_TOKENS,
                shard_tokens=work.tokens // USUAL_SHARDS,
                device=device,
                available=available,
                store=store,
            )
            for run in _runs(list(its), work.per_run)
        ]
        plans += made
        releases.append(_cost(release, its, made, work))
    return Plan(releases, _together(plans, refused, device, available), rates or Rates(), prices or Prices())


def _runs(saes: Sequence[str], per_run: int) -> list[Sequence[str]]:
    return [saes[start : start + per_run] for start in range(0, len(saes), per_run)]


def _cost(release: str, candidates: Mapping[str, _Candidate], plans: Sequence[PassPlan], work: Work) -> ReleaseCost:
    chunks = [[candidates[sae] for sae in chunk] for plan in plans for chunk in plan.chunks]
    sites: dict[tuple[str, int], list[Footprint]] = {}
    for candidate in (c for chunk in chunks for c in chunk):
        sites.setdefault((candidate.site, candidate.d_in), []).append(candidate.footprint)
    costs = [
        SiteCost(site, d_in, Counter((f.features, f.stored) for f in found), sum(f.l0 for f in found), work.tokens)
        for (site, d_in), found in sites.items()
    ]
    depths = [1 + max(site.layer for c in chunk for site in c.footprint.sites) for chunk in chunks]
    model = shape_of(next(iter(candidates.values())).model) or work.subject
    return ReleaseCost(release, costs, model, depths, work.tokens, work.context_length)


def _together(plans: Sequence[PassPlan], refused: Mapping[str, str], device: str, available: int) -> PassPlan:
    """The plans of several runs as one."""
    joined = PassPlan([], dict(refused), {}, {}, [], [], BATCH_TOKENS, available, device)
    for plan in plans:
        joined = PassPlan(
            joined.chunks + plan.chunks,
            joined.refused | plan.refused,
            {**joined.footprints, **plan.footprints},
            {**joined.disk, **plan.disk},
            joined.batch + plan.batch,
            joined.held + plan.held,
            BATCH_TOKENS,
            available,
            device,
        )
    return joined


def _memory(work: Work) -> tuple[str, int]:
    """The kind of device that is planned for, and the bytes that are there besides the subject model."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device.type, free_memory(device) if work.memory_bytes is None else work.memory_bytes


def _place(name: str) -> Path | str:
    """The folder that `name` is, in one spelling, or else the name itself."""
    folder = Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else name


def _found(place: Path | str) -> "Iterator[tuple[str, _Candidate | str]]":
    """The SAEs of a folder or a known release, by name; or why one cannot be planned."""
    return _in_folder(place) if isinstance(place, Path) else _listed(place)


def _listed(name: str) -> "Iterator[tuple[str, _Candidate | str]]":
    repos = releases_named(name)
    if not repos:
        raise DictionaryError(
            f"{name} is not a folder, and no release of that name is known; give folders of releases or of single SAEs, "
            f"or of {', '.join(listed_releases())}"
        )
    for repo in repos:
        for path, dictionary in listed_saes(repo).items():
            yield f"{repo}/{path}", _candidate(repo, path.split("/")[0], dictionary)


def _in_folder(root: Path) -> "Iterator[tuple[str, _Candidate | str]]":
    found = formats.find(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))
    if not found:
        raise DictionaryError(f"{root} holds no known weight file; give folders of releases or of single SAEs")
    for files in found:
        release = root.name
        if not files.path:  # an SAE's own folder: names that stand for a missing config are those of the folders around it
            files, release = replace(files, path="/".join(root.parts[-2:])), root.parent.parent.name
        name = f"{release}/{files.path}"
        if files.missing:
            yield name, f"lacks {', '.join(files.missing)}; download the whole folder"
            continue
        try:
            dictionary = formats.load(root, files, release)
        except DictionaryError as error:
            yield name, str(error)
        else:
            yield name, _candidate(release, formats.facts(files, release).site or dictionary.kind, dictionary)


def _candidate(release: str, site: str, dictionary: SparseDictionary) -> _Candidate:
    return _Candidate(release, dictionary.model_name, site, dictionary.d_in, footprint_of(dictionary))
