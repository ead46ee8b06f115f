"""The catalog asset: every SAE ever seen and what became of it. Not here: looking or the table (scopeatlas)."""

import dagster as dg

from assets.partitions import OWNERS
from assets.support import failures
from resources.sae import SaeSourceResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas import discovery
from scopeatlas.atlas.catalog import CATALOG_SCHEMA, read_catalog


@dg.asset(
    group_name="releases",
    kinds={"huggingface", "lancedb"},
    owners=OWNERS,
    code_version="1",
    metadata={
        "dagster/table_name": "catalog",
        "dagster/column_schema": dg.TableSchema(
            columns=[dg.TableColumn(field.name, str(field.type)) for field in CATALOG_SCHEMA]
        ),
    },
)
def sae_catalog(
    context: dg.AssetExecutionContext, store: StoreResource, subject: SubjectResource, saes: SaeSourceResource
) -> dg.MaterializeResult:
    """One row for every SAE that the watch rules or folders have shown: kind, site, width, L0, bytes, and its state."""
    opened = store.open()
    with failures("sae_catalog"):
        found = discovery.look(opened, saes.folder_paths(), saes.rules(), subject=subject.open())
        discovery.refresh_states(opened)
        catalog = read_catalog(opened.root)
    for source, error in found.errors.items():
        context.log.warning(f"sae_catalog: {source}: {error}")
    states = dict(catalog["state"].value_counts().iter_rows())
    context.log.info(f"sae_catalog: {len(catalog):,} SAEs: {', '.join(f'{n:,} {state}' for state, n in sorted(states.items()))}")
    shown = catalog.select("release", "path", "kind", "site", "width", "target_l0", "bytes", "state").head(50)
    records = [dg.TableRecord({name: value or "" for name, value in row.items()}) for row in shown.to_dicts()]
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": len(catalog),
            **{f"saes_{state}": count for state, count in states.items()},
            "preview": dg.MetadataValue.table(
                records, schema=dg.TableSchema(columns=[dg.TableColumn(name) for name in shown.columns])
            ),
        }
    )
