"""The SAE source: where releases are found. What does not belong here: reading them (scopeatlas/dictionaries)."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from scopeatlas.dictionaries.releases import SaeEntry, fetch_from_hub, find_saes, refuse_incomplete


class HubRelease(dg.Config):
    """SAE folders of one Hub repo."""

    repo: str = Field(description="The repo's id, such as google/gemma-scope-2-270m-pt.")
    revision: str = Field(default="main", description="Branch, tag or commit.")
    paths: list[str] = Field(description="Globs on SAE folders, such as resid_post/layer_12_width_16k_l0_medium.")


class SaeSourceResource(dg.ConfigurableResource):
    """Releases: local folders laid out as the Hub's, and Hub repos."""

    folders: list[str] = Field(default=[], description="Folders that hold releases; the sensor watches them.")
    hub: list[HubRelease] = Field(default=[], description="Hub repos, fetched by make run and never by the sensor.")

    def local(self) -> list[SaeEntry]:
        """Every whole SAE in the folders."""
        return [entry for folder in self.folders for entry in find_saes(Path(folder))]

    def everything(self) -> list[SaeEntry]:
        """The SAEs of the folders and of the Hub repos; an SAE that is not whole is an error here."""
        for folder in self.folders:
            refuse_incomplete(Path(folder))
        fetched = [entry for r in self.hub for entry in fetch_from_hub(r.repo, r.paths, revision=r.revision)]
        return self.local() + fetched
