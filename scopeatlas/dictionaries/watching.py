"""Watching the Hub: which SAEs of which repos are wanted, and when they are whole and have stopped changing.

What belongs here: watch rules, and one poll of the Hub from one state to the next. What does not: talking to the Hub
(`hub.py`), fetching what is ready (`downloads.py`), or remembering what became of it (`atlas/catalog.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypedDict

from scopeatlas.dictionaries.hub import SeenSae, api, bounded_waits, hub_errors, is_outage, list_saes, one_line, resolve
from scopeatlas.dictionaries.layout import parse_width
from scopeatlas.errors import ConfigError
from scopeatlas.storage.files import content_hash

_RANKS = ("seen", "other_model", "too_large", "ready")
"""The verdicts of several rules about one SAE: the one furthest to the right counts."""


@dataclass(frozen=True)
class WatchRule:
    """Which SAEs of which repos are wanted. An empty tuple wants everything.

    author: the Hub organisation. name: glob on repo names, such as gemma-scope-2-*-pt. paths: globs on SAE paths.
    kinds: sae, transcoder, crosscoder, clt. sites: the family's words. widths: 16k or 16384. models: globs on subject
    models, with or without the organisation: those that fit the machine. max_bytes: the largest SAE worth fetching.
    Raises ConfigError on a width that is none, or without an author.
    """

    author: str
    name: str = "*"
    paths: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    widths: tuple[int | str, ...] = ()
    models: tuple[str, ...] = ()
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.author:
            raise ConfigError("a watch rule needs an author; set it to a Hub organisation such as google")
        for width in self.widths:
            if parse_width(str(width)) is None:
                raise ConfigError(f"watch rule of {self.author}/{self.name}: {width!r} is no width; write 16k, 1m or 16384")

    @property
    def search(self) -> str:
        """The longest literal piece of `name`, which the Hub is asked for; the glob itself is applied here."""
        literal = self.name.replace("?", "*").replace("[", "*").split("*")
        return max(literal, key=len).strip("-_.") if "]" not in self.name else ""

    def watches(self, repo: str) -> bool:
        """Whether `repo` is one of those the rule is about."""
        author, _, name = repo.partition("/")
        return author == self.author and fnmatchcase(name, self.name)

    def verdict(self, sae: SeenSae) -> tuple[str, str]:
        """State and reason: seen (not selected), other_model, too_large or ready (wanted)."""
        facts = sae.facts
        widths = tuple(parse_width(str(width)) for width in self.widths)
        if self.paths and not any(fnmatchcase(sae.path, glob) for glob in self.paths):
            return "seen", "no watch rule wants its path"
        for name, wanted, value in (
            ("kind", self.kinds, facts.kind),
            ("site", self.sites, facts.site),
            ("width", widths, facts.width),
        ):
            if wanted and value not in wanted:
                return "seen", f"no watch rule wants {name} {value or 'unknown'}"
        short = facts.model.rsplit("/", 1)[-1]
        if self.models and not any(fnmatchcase(facts.model, glob) or fnmatchcase(short, glob) for glob in self.models):
            return (
                "other_model",
                f"its subject model is {facts.model or 'unknown'}; the watch rules want {', '.join(self.models)}",
            )
        if self.max_bytes is not None and sae.bytes > self.max_bytes:
            return "too_large", f"{sae.bytes} bytes; the watch rules allow {self.max_bytes}"
        return "ready", ""


class RepoState(TypedDict):
    """What is remembered of one repo: its commit, whether that was seen twice, the rules then, its ready SAEs' identities."""

    sha: str
    settled: bool
    rules: str
    ready: dict[str, str]


class WatchState(TypedDict, total=False):
    """What one poll leaves to the next; plain JSON, `{}` at first. after: the repo that was looked at last."""

    repos: dict[str, RepoState]
    after: str


@dataclass(frozen=True)
class PollResult:
    """What one poll found.

    seen: the SAEs of the repos that were looked at, without those that were reported as ready before and have the same
    files. gone_repos, gone_saes (repo, path): no longer on the Hub. errors: one line by repo (or author/name glob).
    waiting: repos left for the next poll.
    """

    seen: list[SeenSae] = field(default_factory=list)
    state: WatchState = field(default_factory=WatchState)
    gone_repos: list[str] = field(default_factory=list)
    gone_saes: list[tuple[str, str]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)

    @property
    def ready(self) -> list[SeenSae]:
        return [sae for sae in self.seen if sae.state == "ready"]


def poll(rules: Sequence[WatchRule], state: WatchState, *, max_repos: int = 20, max_wait_s: float = 20) -> PollResult:
    """Look at the Hub once.

    One list call per author and name finds each repo's commit. A repo whose commit is new is listed and its SAEs are
    `settling`; if the commit is the same at its next turn, its whole SAEs are `ready`; from then on it costs nothing.
    At most `max_repos` are listed, in turn; what rate limits ask for is waited for up to `max_wait_s`. Never raises
    because of the Hub: a repo that cannot be read keeps its state and has a line in `errors`.
    """
    before: Mapping[str, RepoState] = state.get("repos", {})
    repos = {repo: known for repo, known in before.items() if _watching(rules, repo)}
    result = PollResult(state=WatchState(repos=repos, after=state.get("after", "")))
    with bounded_waits(max_wait_s):
        heads, listed = _list_heads(rules, result.errors)
        due = sorted(r for r, sha in heads.items() if not _is_settled(repos.get(r), sha, _fingerprint(rules, r)))
        after = result.state["after"] if "after" in result.state else ""
        due = [repo for repo in due if repo > after] + [repo for repo in due if repo <= after]
        looked_at = _look_at(due[:max_repos], heads, rules, result)
        result.waiting.extend(due[looked_at:])
        missing = [repo for repo in repos if repo not in heads and all(rule in listed for rule in _watching(rules, repo))]
        _confirm_gone(missing, result)
    return result


def _watching(rules: Sequence[WatchRule], repo: str) -> list[WatchRule]:
    return [rule for rule in rules if rule.watches(repo)]


def _fingerprint(rules: Sequence[WatchRule], repo: str) -> str:
    """Changes when other SAEs of the repo may be wanted."""
    return content_hash([asdict(rule) for rule in _watching(rules, repo)])[:16]


def _is_settled(known: RepoState | None, sha: str, fingerprint: str) -> bool:
    return known is not None and known["settled"] and (known["sha"], known["rules"]) == (sha, fingerprint)


def _list_heads(rules: Sequence[WatchRule], errors: dict[str, str]) -> tuple[dict[str, str], list[WatchRule]]:
    """The commit of every watched repo, and the rules whose listing succeeded."""
    heads: dict[str, str] = {}
    listed: list[WatchRule] = []
    for author, search in dict.fromkeys((rule.author, rule.search) for rule in rules):
        asking = [rule for rule in rules if (rule.author, rule.search) == (author, search)]
        try:
            found = {m.id: m.sha for m in api().list_models(author=author, search=search or None, expand=["sha"])}
        except hub_errors() as error:
            errors |= {f"{rule.author}/{rule.name}": one_line(error, f"{rule.author}/{rule.name}") for rule in asking}
            if is_outage(error):
                break
            continue
        heads |= {repo: sha for repo, sha in found.items() if sha and _watching(asking, repo)}
        listed += asking
    return heads, listed


def _look_at(repos: list[str], heads: Mapping[str, str], rules: Sequence[WatchRule], result: PollResult) -> int:
    """List `repos` into `result`; returns how many of them were tried before the Hub as a whole failed."""
    for tried, repo in enumerate(repos):
        result.state["after"] = repo
        try:
            listed = list_saes(repo, heads[repo])
        except hub_errors() as error:
            result.errors[repo] = one_line(error, repo)
            if is_outage(error):
                return tried
            continue
        _judge(repo, heads[repo], listed, rules, result)
    return len(repos)


def _judge(repo: str, sha: str, listed: list[SeenSae], rules: Sequence[WatchRule], result: PollResult) -> None:
    """Report what changed in a repo since it was last looked at, and remember it."""
    repos = result.state.setdefault("repos", {})
    known = repos.get(repo)
    was_ready = known["ready"] if known else {}
    settled = known is not None and known["sha"] == sha
    ready: dict[str, str] = {}
    for sae in listed:
        verdicts = (rule.verdict(sae) for rule in _watching(rules, repo))
        state, reason = max(verdicts, key=lambda verdict: _RANKS.index(verdict[0]))
        if state == "ready" and sae.files.missing:
            state, reason = "incomplete", f"lacks {', '.join(sae.files.missing)}"
        elif state == "ready" and was_ready.get(sae.path) == sae.identity:
            ready[sae.path] = sae.identity
            continue
        elif state == "ready" and settled:
            ready[sae.path] = sae.identity
        elif state == "ready":
            state, reason = "settling", "waits for the repo to stay the same over two polls"
        result.seen.append(replace(sae, state=state, reason=reason))
    present = {sae.path for sae in listed}
    result.gone_saes.extend((repo, path) for path in was_ready if path not in present)
    repos[repo] = RepoState(sha=sha, settled=settled, rules=_fingerprint(rules, repo), ready=ready)


def _confirm_gone(repos: list[str], result: PollResult) -> None:
    """Of repos that were not listed, find those that are really gone: a search may leave one out."""
    from huggingface_hub.errors import RepositoryNotFoundError

    for repo in repos:
        try:
            resolve(repo, "main")
        except RepositoryNotFoundError:
            result.gone_repos.append(repo)
            del result.state.get("repos", {})[repo]
        except hub_errors() as error:
            result.errors[repo] = one_line(error, repo)
            if is_outage(error):
                return
