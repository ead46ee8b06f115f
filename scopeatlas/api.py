"""`Atlas`: the one object that people hold; each question about features is one call of it.

What belongs here: the calls, their arguments and where each is answered. What does not: an answer (`atlas/`, `study/`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.history import FeatureHistory, feature_history
from scopeatlas.atlas.hits import SearchResults
from scopeatlas.atlas.search import AtlasReader
from scopeatlas.errors import AtlasError
from scopeatlas.evidence import FeaturePage, read_evidence
from scopeatlas.exchange.circuit_tracer import LabelledGraph, export_circuit_tracer, label_graph
from scopeatlas.exchange.hub_dataset import export_dataset
from scopeatlas.exchange.neuronpedia import NeuronpediaExport, export_neuronpedia
from scopeatlas.exchange.neuronpedia_import import ImportedExplanations, import_neuronpedia
from scopeatlas.exchange.tables import export_parquet
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location
from scopeatlas.study.attribution import Attribution, attribute
from scopeatlas.study.causal import CONTROLS, CausalCheck, causal_check
from scopeatlas.study.compare import Comparison, compare
from scopeatlas.study.contrast import ALPHA, Contrast, contrast
from scopeatlas.study.densities import Densities, densities
from scopeatlas.study.diff import Diff, diff
from scopeatlas.study.edits import Edit, edits_of
from scopeatlas.study.generation import Positions
from scopeatlas.study.intervene import CONTINUATION, Intervention, intervene
from scopeatlas.study.opening import OpenSae, open_sae
from scopeatlas.study.permutation import PERMUTATIONS
from scopeatlas.study.shared_tokens import TOKENS
from scopeatlas.study.similar import SimilarBy, by_coactivation, by_decoder, by_vector
from scopeatlas.study.texts import Text
from scopeatlas.study.topics import DISTANCE, Topics, topics
from scopeatlas.study.trace import TOP, Trace, trace
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import numpy as np
    import torch
    from lancedb.table import Table


class Atlas(AtlasReader):
    """A published atlas. Search it, look features up, and ask about text of your own. Made by `open_atlas`.

    Questions about text load an SAE's weights and its subject model once and keep them.
    """

    def __init__(self, root: Location, features: "Table", embedder: Embedder | None):
        super().__init__(root, features, embedder)
        self.subject: SubjectModel | None = None
        self._opened: dict[str, OpenSae] = {}
        self._versions: dict[str, int] = {}

    def open(self, sae: str) -> OpenSae:
        """An SAE with its weights, its subject model and its rows as they are published now, by its key or enough of one.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do, NotReadyError if its publication does not say
        which subject model it is of.
        """
        key, version = self._one(sae), self._features.version
        if key not in self._opened:
            opened = open_sae(self, key, subject=self.subject)
            loaded = [other.subject for other in self._opened.values() if other.subject == opened.subject]
            self._opened[key] = replace(opened, subject=loaded[0]) if loaded else opened
        elif self._versions[key] != version:  # somebody has published since
            self._opened[key] = self._opened[key].with_rows(self.rows(key)[1])
        self._versions[key] = version
        return self._opened[key]

    def similar(
        self,
        sae: str,
        feature: int | str,
        *,
        by: SimilarBy = "meaning",
        k: int = 10,
        offset: int = 0,
        within: str | None = None,
    ) -> SearchResults:
        """Features like this one, the likest first, itself left out.

        sae, feature: as `feature` takes them. by: `meaning`, by the vectors of labels and examples, in any SAE; `decoder`, by
        the cosine of decoder rows, exact; `coactivation`, by the Jaccard index of the tokens on which both fire, of which the ten
        likest are kept. within: where to look, a key or part of one. By meaning that is everywhere; by decoder it is one
        SAE, its own by default, that writes as many sites of the same size; by coactivation its own alone.
        Raises as `feature` and `open` do, AtlasError for an SAE that does not compare, NotReadyError if co-activations are gone.
        """
        if by == "meaning":
            return self.like(sae, feature, k=k, offset=offset, within=within)
        hit = self.feature(sae, feature)
        opened, other = self.open(hit.sae), self.open(within or hit.sae)
        if by == "decoder":
            return by_decoder(opened, hit.feature, within=other, k=k, offset=offset)
        if other.key != opened.key:
            raise AtlasError(f"co-activation is counted within one SAE, not with {other.key}; leave `within` out")
        return by_coactivation(opened, hit.feature, k=k, offset=offset)

    def by_vector(
        self, sae: str, vector: "Sequence[float] | np.ndarray | torch.Tensor", *, k: int = 10, offset: int = 0
    ) -> SearchResults:
        """The features of an SAE whose decoder rows point most nearly where `vector` does, by cosine, exact.

        vector: [d_out], such as a decoder row or a steering vector; of an SAE that writes several sites [sites, d_out].
        Raises as `open` does, and AtlasError on a vector of another shape, or one that is zero or not finite.
        """
        return by_vector(self.open(sae), vector, k=k, offset=offset)

    def show(self, sae: str, feature: int | str) -> FeaturePage:
        """One feature with all that stands behind it: its label, the test of it beside its controls, and where it fires.

        sae: a key or enough of one. feature: its flat id, or `7.123` of a multi-layer SAE. Raises as `feature` does.
        """
        hit = self.feature(sae, feature)
        return FeaturePage(hit, read_evidence(Store(self.root), hit))

    def densities(self, sae: str) -> Densities:
        """How often the features of an SAE fire, as a histogram, and how many of them have labels. Raises as `rows` does."""
        return densities(*self.rows(sae))

    def history(self, sae: str, feature: int | str) -> FeatureHistory:
        """What one feature was said to be, publication by publication, and every label it was ever given with its test.

        sae: a key or enough of one. feature: its flat id, or `7.123` of a multi-layer SAE. Raises as `feature` does.
        """
        hit = self.feature(sae, feature)
        return feature_history(Store(self.root), hit.sae, hit.feature, key=hit.key)

    def trace(
        self, texts: Text | Sequence[Text], *, sae: str | Sequence[str], top: int = TOP, min_activation: float = 0.0
    ) -> Trace:
        """Which features fire in texts, token by token, with their labels and scores, and what share of it labels explain.

        texts: one or several; each a string, or a conversation, [{"role": "user", "content": "..."}, ...], read through the
        subject model's chat template. sae: a key or enough of one, or several of one subject model. top: how many labelled and
        how many unlabelled features of a text summaries and pictures name; `to_polars()` has all. min_activation: what fires
        less, in the SAE's own units, is taken not to fire. BOS and chat markup never fire.
        Raises as `open` does; ConfigError without a text; SubjectModelError for a conversation that the template refuses.
        """
        return trace(
            [self.open(one) for one in ([sae] if isinstance(sae, str) else sae)], texts, top=top, min_activation=min_activation
        )

    def contrast(
        self,
        a: Sequence[Text],
        b: Sequence[Text],
        *,
        sae: str,
        pairs: bool = False,
        permutations: int = PERMUTATIONS,
        seed: int = 0,
        alpha: float = ALPHA,
    ) -> Contrast:
        """Which features of an SAE differ between two sets of texts or conversations, and whether words, a linear probe on the
        same activations or the texts' length tell them apart as well.

        a, b: a text or conversation (as in `trace`) is one document and counts once. pairs: a[i] belongs to b[i]. p-values permute
        documents, and the chance of reporting any feature falsely is `alpha` at most over all of them. `features` has a row for
        each (effects in standard deviations over documents, means in the SAE's own units per token); `verdict` says it in words.
        Raises as `open` does; ConfigError for fewer than two texts in a set, an empty one, or pairs of sets that differ in length.
        """
        return contrast(self.open(sae), a, b, pairs=pairs, permutations=permutations, seed=seed, alpha=alpha)

    def topics(self, texts: Sequence[Text], *, sae: str, distance: float = DISTANCE) -> Topics:
        """What a batch of at least two texts is about: a table of text by feature, rolled up into topics of features that
        mean alike, and beside it words by TF-IDF rolled up in the same way.

        texts: strings or conversations. sae: a key or enough of one. distance: of the average cosine, 0 to 2, at which two
        groups of features are two topics; smaller gives more and narrower ones. `agreement(groups)` tests both against groups
        that are known. Raises as `open` does, and ConfigError for fewer than two texts.
        """
        return topics(self.open(sae), texts, embedder=self._checked_embedder(), distance=distance)

    def export_neuronpedia(
        self,
        sae: str,
        folder: str | Path,
        *,
        model_id: str,
        source_set: str,
        creator: str,
        logits: bool = True,
        log: Log = silent,
    ) -> NeuronpediaExport:
        """Write an SAE into `folder` in Neuronpedia's bulk layout, scores and provenance beside it; SAEs may share a folder.

        model_id, source_set: Neuronpedia's names, as in gemma-3-270m and mylab-res-16k; the source is {layer}-{source_set}. creator:
        the name that pages show. logits: also effects on the logits, for which the subject model is loaded.
        Raises as `open` does with `logits`; NotReadyError if examples, labels or scores are gone; ExchangeError if the source
        is in the folder already.
        """
        subject = self.open(sae).subject if logits else None
        return export_neuronpedia(
            self, sae, Path(folder), model_id=model_id, source_set=source_set, creator=creator, subject=subject, log=log
        )

    def import_neuronpedia(
        self, sae: str, path: str | Path, *, model_id: str | None = None, source: str | None = None
    ) -> ImportedExplanations:
        """Make Neuronpedia's explanations labels of method `imported`, which are chosen and scored like any other when the
        labels are next made.

        path: a folder of the bulk layout, or one file as it was downloaded. model_id, source: take lines of this model or source
        of Neuronpedia's, where its name is not known to be this SAE's. Importing the same again changes nothing.
        Raises ExchangeError with file and line for one that is damaged, or of another model, layer or width.
        """
        return import_neuronpedia(self, sae, Path(path), model_id=model_id, source=source)

    def export_parquet(self, sae: str, folder: str | Path) -> Path:
        """Write all tables of an SAE (features, labels, scores, examples, ...) into a new folder, with SCHEMA.md; returns it.

        Raises NotReadyError if examples, labels or scores are gone, ExchangeError if the folder holds anything.
        """
        return export_parquet(self, sae, Path(folder))

    def export_dataset(self, sae: str, folder: str | Path, *, licence: str = "", title: str = "") -> Path:
        """Write an SAE into a new folder as a Hugging Face dataset with a card, for `datasets.load_dataset(folder, "labels")`;
        `scopeatlas import dataset` publishes it in another atlas. licence: as the Hub spells it. Raises as `export_parquet`.
        """
        return export_dataset(self, sae, Path(folder), licence=licence, title=title)

    def export_circuit_tracer(self, sae: str, folder: str | Path, *, scan: str) -> int:
        """Write the file of each feature that circuit-tracer's viewer shows into {folder}/{scan}; returns how many.

        scan: the name of a set of transcoders, into which several SAEs go. Raises NotReadyError as `export_parquet` does.
        """
        return export_circuit_tracer(self, sae, Path(folder), scan=scan)

    def label_graph(
        self, saes: str | Sequence[str], graph: str | Path, target: str | Path, *, scan: str | None = None
    ) -> LabelledGraph:
        """Write circuit-tracer's graph to `target` with labels and their scores on its nodes, refusals in brackets.

        saes: those that the graph was made with, which read a layer each. scan: have the viewer read what
        `export_circuit_tracer` wrote under this name. Raises ExchangeError for a file that is no graph.
        """
        return label_graph(self, [saes] if isinstance(saes, str) else saes, Path(graph), Path(target), scan=scan)

    def compare(self, sae_a: str, feature_a: int | str, sae_b: str, feature_b: int | str) -> Comparison:
        """Two features side by side: decoder cosine, correlation of activations on the same tokens, labels, and how well each
        one's rule describes the other.

        sae_a, sae_b: keys or enough of them, of one SAE or of two whose models read the same tokens. feature_a, feature_b: as
        `feature` takes them. Without cached activations of both over one corpus, texts are run through the model (minutes on a
        CPU). Raises as `feature` and `open` do, and SubjectModelError if the two models read different tokens.
        """
        hit_a, hit_b = self.feature(sae_a, feature_a), self.feature(sae_b, feature_b)
        return compare(
            self.open(hit_a.sae),
            hit_a.feature,
            self.open(hit_b.sae),
            hit_b.feature,
            embed=lambda texts: self._checked_embedder().embed(texts),
        )

    def diff(self, sae_a: str, sae_b: str, *, tokens: int = TOKENS, transfer_labels: bool = False) -> Diff:
        """What became of the features of one SAE in another: kept, changed, split, merged or vanished; and what appeared.

        The two may differ in seed, width, layer or fine-tune, as long as their models read the same tokens. Features are matched
        by the correlation of their activations on at most `tokens` tokens of explain and select documents. transfer_labels:
        also test a's labels on their matches in b, on report documents. Cost and errors as for `compare`.
        """
        return diff(self.open(sae_a), self.open(sae_b), tokens=tokens, transfer_labels=transfer_labels)

    def intervene(
        self,
        prompt: Text,
        *,
        sae: str,
        ablate: Sequence[int | str] = (),
        steer: Mapping[int | str, float] | None = None,
        edits: Sequence[Edit] = (),
        positions: Positions = "all",
        tokens: int = CONTINUATION,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Intervention:
        """What becomes of a prompt's next token and continuation when features are ablated or steered; nothing else is changed,
        what the SAE leaves unexplained included.

        prompt: a string, or a conversation that the model is to answer. Features are flat ids, or `7.123` of a multi-layer SAE.
        steer: by feature how much is added at each token, in units of its greatest activation in the corpus (below 0: taken
        off). edits: anything else, `Edit(feature, "set" | "scale" | "add", value)` in units of activation. positions: "all",
        "prompt", "generated", "last" (of the prompt) or numbers of the prompt's tokens. tokens: how many each continuation has
        at most, greedy or drawn with `seed` above temperature 0.
        Raises as `open` does; AtlasError for a feature that there is not; ConfigError for no edits, two of one feature, a
        feature that is steered and never fired, a position that is none; SubjectModelError for a site that cannot be edited.
        """
        opened = self.open(sae)
        asked = edits_of(opened, ablate=ablate, steer=steer, edits=edits)
        return intervene(opened, prompt, edits=asked, positions=positions, tokens=tokens, temperature=temperature, seed=seed)

    def causal_check(
        self,
        prompts: Text | Sequence[Text],
        *,
        sae: str,
        tokens: Sequence[int | str],
        against: Sequence[int | str] = (),
        ablate: Sequence[int | str] = (),
        steer: Mapping[int | str, float] | None = None,
        edits: Sequence[Edit] = (),
        positions: Positions = "prompt",
        controls: int = CONTROLS,
        seed: int = 0,
    ) -> CausalCheck:
        """Whether features do what a contrast or a label suggests: the mean change over prompts of the probability that the next
        token is one of `tokens`, or with `against` of the log-odds of `tokens` over `against`, with a 95 % interval over
        prompts, beside `controls` draws of random features of the same norm.

        Tokens are ids, or texts of one token each (" Paris" is not "Paris"). Features and positions as of `intervene`, whose
        errors are raised; ConfigError also for no prompts and for a text that is not one token.
        """
        opened = self.open(sae)
        asked = edits_of(opened, ablate=ablate, steer=steer, edits=edits)
        return causal_check(
            opened,
            prompts,
            edits=asked,
            tokens=tokens,
            against=against,
            positions=positions,
            controls=controls,
            seed=seed,
        )

    def attribute(
        self,
        prompt: Text,
        *,
        sae: str,
        target: int | str,
        against: int | str | None = None,
        position: int = -1,
        verify: int = 0,
    ) -> Attribution:
        """Which features the logit of the next token `target` comes from, less that of `against` (by default the mean of all):
        activation times gradient, in logits, and how much of it features, reconstruction error and bias have.

        position: the token of the prompt after which it is, from 0; -1 is the last. verify: so many of the first features are
        ablated in earnest, and their effect stands beside. Tokens and errors as of `causal_check`.
        """
        return attribute(self.open(sae), prompt, target=target, against=against, position=position, verify=verify)


def open_atlas(path: str | Location, *, embedder: Embedder | None = None, subject: SubjectModel | None = None) -> Atlas:
    """Open the atlas under the store root `path`. See `scopeatlas.open_atlas`."""
    atlas = Atlas.at(path, embedder=embedder)
    atlas.subject = subject
    return atlas
