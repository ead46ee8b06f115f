"""The last step of `make demo`: what was built, and a few searches with their evidence.

What belongs here: the demo's words. The searches were written down before the atlas they are run on was first built.
"""

import sys

from resources.scenario import load_scenario, scenario_path
from scopeatlas import open_atlas
from scopeatlas.errors import ScopeAtlasError
from scopeatlas.rendering.features import print_hits
from scopeatlas.rendering.stores import print_saes
from scopeatlas.rendering.text import console

SEARCHES = (
    "wars, armies and battles",
    "months of the year",
    "chemistry: acids, metals and compounds",
)
NOTHING_OF_THE_KIND = "chocolate cake recipe"
HITS = 5


def main() -> int:
    out = console()
    try:
        atlas = open_atlas(load_scenario(scenario_path())["store"].root)  # type: ignore[attr-defined]
        out.print("\nWhat was built\n")
        print_saes(out, atlas.saes())
        for query in (*SEARCHES, NOTHING_OF_THE_KIND):
            out.print(f'\nSearch: "{query}"\n')
            print_hits(out, atlas.search(query, k=HITS))
    except ScopeAtlasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out.print('\nNext: scopeatlas search "your words", scopeatlas show SAE FEATURE, make ui', style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
