"""The SAE source: where releases are found. What does not belong here: reading them (scopeatlas/dictionaries)."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from pydantic import Field

from scopeatlas.dictionaries.downloads import fetch_from_hub
from scopeatlas.dictionaries.registration import fetch_missing
from scopeatlas.dictionaries.releases import SaeEntry, find_saes, refuse_incomplete
from scopeatlas.dictionaries.watching import WatchRule
from scopeatlas.runner.local import Log


class HubRelease(dg.Config):
    """SAEs of one Hub repo."""

    repo: str = Field(description="The repo's id, such as google/gemma-scope-2-270m-pt.")
    revision: str = Field(default="main", description="Branch, tag or commit.")
    paths: list[str] = Field(description="Globs on SAE paths, such as resid_post/layer_12_width_16k_l0_medium.")


class Watch(dg.Config):
    """Repos that the release sensor watches, and which of their SAEs are wanted. An empty list wants everything."""

    author: str = Field(description="The Hub organisation, such as google.")
    name: str = Field(default="*", description="Glob on repo names, such as gemma-scope-2-*-pt.")
    paths: list[str] = Field(default=[], description="Globs on SAE paths, such as resid_post/*.")
    kinds: list[str] = Field(default=[], description="sae, transcoder, crosscoder, clt.")
    sites: list[str] = Field(default=[], description="The family's own words: resid_post, mlp_out, transcoder_all and so on.")
    widths: list[str] = Field(default=[], description="16k, 65k, 1m or plain numbers.")
    models: list[str] = Field(default=[], description="Globs on subject models: those whose size fits this machine.")
    max_gb: float | None = Field(default=None, description="GiB of the largest SAE worth fetching.")

    def rule(self) -> WatchRule:
        return WatchRule(
            author=self.author,
            name=self.name,
            paths=tuple(self.paths),
            kinds=tuple(self.kinds),
            sites=tuple(self.sites),
            widths=tuple(self.widths),
            models=tuple(self.models),
            max_bytes=None if self.max_gb is None else int(self.max_gb * 2**30),
        )


class SaeSourceResource(dg.ConfigurableResource):
    """Releases: local folders laid out as the Hub's (or as its cache), Hub repos, and rules for repos to watch."""

    folders: list[str] = Field(default=[], description="Folders that hold releases; the sensor watches them.")
    hub: list[HubRelease] = Field(default=[], description="Hub repos, fetched by make run.")
    watch: list[Watch] = Field(default=[], description="Hub repos that the sensor watches for new SAEs.")
    cache: str | None = Field(default=None, description="Where downloads go; empty is the Hugging Face cache.")
    quota_gb: float | None = Field(default=None, gt=0, description="GiB that the cache may hold; what would pass it is refused.")
    per_run: int = Field(default=16, ge=1, description="SAEs that the sensor puts into one run, which share its forward passes.")
    runs_per_tick: int = Field(default=2, ge=1, description="Runs that the sensor asks for at most in one tick.")

    def folder_paths(self) -> list[Path]:
        return [Path(folder) for folder in self.folders]

    def local(self) -> list[SaeEntry]:
        """Every whole SAE in the folders."""
        return [entry for folder in self.folder_paths() for entry in find_saes(folder)]

    def everything(self) -> list[SaeEntry]:
        """The SAEs of the folders and of the Hub repos; an SAE that is not whole is an error here."""
        for folder in self.folder_paths():
            refuse_incomplete(folder)
        limits = {"cache": self.cache_folder(), "quota_bytes": self.quota_bytes()}
        return self.local() + [e for r in self.hub for e in fetch_from_hub(r.repo, r.paths, revision=r.revision, **limits)]

    def rules(self) -> list[WatchRule]:
        return [watch.rule() for watch in self.watch]

    def fetch(self, entries: Sequence[SaeEntry], *, log: Log) -> dict[str, str]:
        """Download what entries announced from the Hub still lack; returns why, for each that could not be fetched."""
        return fetch_missing(entries, cache=self.cache_folder(), quota_bytes=self.quota_bytes(), log=log)

    def cache_folder(self) -> Path | None:
        return None if self.cache is None else Path(self.cache)

    def quota_bytes(self) -> int | None:
        return None if self.quota_gb is None else int(self.quota_gb * 2**30)
