"""Loading a subject model and its tokenizer from a Hub id, a local folder, a GGUF file or a package that carries one.

What belongs here: turning a model's name into a loaded model with an identity. What does not: where in it
activations are read (`sites.py`, `capture.py`).
"""

import importlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scopeatlas.errors import SubjectModelError
from scopeatlas.storage.files import content_hash, file_sha256
from scopeatlas.subject.names import names_same_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_PREFIX = "package:"
Precision = Literal["auto", "float32", "bfloat16"]
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class SubjectModel:
    """A subject model by name, loaded on first use.

    name: a Hub id, a local folder in the Hub's layout, a path to a .gguf file, or `package:NAME` for a Python package
    whose `assemble()` gives such a file. precision: float32 or bfloat16; `auto` is bfloat16 on CUDA, float32
    elsewhere; float16 is not offered because Gemma's residual stream overflows it. cache: where a GGUF is unpacked.
    serves: other names under which releases know this model, for a folder, a file or a package that does not say.
    random_seed: the same architecture and tokenizer with the weights that its configuration initialises, drawn with this
    seed, in place of the trained ones: what is found in such a model is no finding (Heap et al. 2025).
    batch_tokens: of one batch, padding included; it determines the last bits of activations, so it is part of what they are.
    """

    name: str
    revision: str | None = None
    precision: Precision = "auto"
    device: str = "auto"
    cache: Path = Path(".scopeatlas/models")
    serves: tuple[str, ...] = ()
    random_seed: int | None = None
    batch_tokens: int = BATCH_TOKENS

    def matches(self, model_name: str) -> bool:
        """Whether a release for `model_name` is one for this model.

        A release that names none is for any; a file, folder or package without `serves` is taken at its word.
        """
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and not Path(self.name).exists()
        if not model_name or not (self.serves or is_hub_id):
            return True
        return any(names_same_model(model_name, name) for name in (self.name, *self.serves))

    def recipe(self) -> dict[str, Any]:
        """What another process needs to load the same model again, as JSON; the device that it runs on is not part of it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "precision": self.precision,
            "serves": list(self.serves),
            "random_seed": self.random_seed,
            "batch_tokens": self.batch_tokens,
            "cache": str(self.cache.resolve()),
        }

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], *, device: str = "auto") -> "SubjectModel":
        """The model that `recipe` wrote down; where a GGUF lies unpacked on this machine, it is not unpacked again."""
        body: dict[str, Any] = {**recipe, "serves": tuple(recipe["serves"]), "device": device}
        cache = Path(body.pop("cache"))
        if cache.is_dir():
            body["cache"] = cache
        return cls(**body)

    @cached_property
    def folder(self) -> str:
        """What transformers is given: a Hub id or a local folder (a GGUF is unpacked once, into `cache`)."""
        gguf = _gguf_path(self.name)
        if gguf is not None:
            return str(_unpack_gguf(gguf, self.cache))
        path = Path(self.name).expanduser()
        if path.is_dir() and not (path / "config.json").exists():
            raise SubjectModelError(
                f"{path} holds no config.json: give a folder as save_pretrained writes it, a .gguf file or a Hub id"
            )
        return str(path) if path.is_dir() else self.name

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, revision=self.revision)
        except (OSError, ValueError) as error:
            raise SubjectModelError(f"cannot load the tokenizer of {self.name}: {_first_line(error)}") from error

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The model's configuration; of a vision-language model, that of its text half."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, revision=self.revision).get_text_config()
        except (OSError, ValueError) as error:
            raise self._cannot_load(error) from error

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The model, in eval mode, on `resolved_device` and in `resolved_dtype`; vision-language models keep their wrapper."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            model = self._pretrained() if self.random_seed is None else self._initialised(self.random_seed)
        except (OSError, ValueError) as error:
            raise self._cannot_load(error) from error
        return model.to(self.resolved_device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]

    def _pretrained(self) -> "PreTrainedModel":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.folder, revision=self.revision, dtype=self.resolved_dtype, attn_implementation=self._attention
        )

    def _initialised(self, seed: int) -> "PreTrainedModel":
        """The model as training would start with it. The global generator is left as it was."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.folder, revision=self.revision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=self.resolved_dtype, attn_implementation=self._attention)

    @property
    def _attention(self) -> str | None:
        """Only eager attention caps Gemma 2's scores."""
        return "eager" if self.config.model_type == "gemma2" else None

    def _cannot_load(self, error: Exception) -> SubjectModelError:
        return SubjectModelError(
            f"cannot load subject model {self.name}: {_first_line(error)}; check subject.name and the network"
        )

    @cached_property
    def resolved_device(self) -> "torch.device":
        import torch

        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    @cached_property
    def resolved_dtype(self) -> "torch.dtype":
        import torch

        chosen = (
            ("bfloat16" if self.resolved_device.type == "cuda" else "float32") if self.precision == "auto" else self.precision
        )
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[chosen]

    @cached_property
    def identity(self) -> str:
        """A hash that changes when the weights do, without reading gigabytes: a Hub commit, or config, file names,
        sizes and safetensors headers of a local folder; with random weights, their seed as well."""
        return self._identity if self.random_seed is None else content_hash(self._identity, "random", self.random_seed)

    @property
    def _identity(self) -> str:
        path = Path(self.folder)
        if path.is_dir():
            return content_hash(
                [_file_identity(p) for p in sorted(path.iterdir()) if p.suffix in {".json", ".safetensors", ".bin"}]
            )
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else (self.revision or "main")
        return content_hash(self.name, commit)

    @cached_property
    def tokenizer_identity(self) -> str:
        """A hash of the tokenizer's vocabulary and special tokens."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return content_hash(vocabulary, self.tokenizer.bos_token_id)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _file_identity(path: Path) -> list[object]:
    if path.suffix != ".safetensors":
        return [path.name, file_sha256(path)] if path.suffix == ".json" else [path.name, path.stat().st_size]
    with path.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        first_values = stream.read(1 << 20)
    return [path.name, path.stat().st_size, content_hash(header.hex(), first_values.hex())]


def _gguf_path(name: str) -> Path | None:
    if name.startswith(PACKAGE_PREFIX):
        package = name.removeprefix(PACKAGE_PREFIX)
        try:
            return Path(importlib.import_module(package).assemble())
        except ImportError as error:
            raise SubjectModelError(f"subject model {name}: no package {package}; pip install 'scope-atlas[demo]'") from error
    return Path(name).expanduser() if name.endswith(".gguf") else None


def _unpack_gguf(gguf: Path, cache: Path) -> Path:
    """Dequantise a GGUF into a plain float32 folder, once: it loads in 2 s where the GGUF takes 45."""
    if not gguf.exists():
        raise SubjectModelError(f"{gguf} does not exist; check subject.name")
    folder = cache / f"{gguf.stem}-{file_sha256(gguf)[:12]}"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats from here on, but the model still calls itself quantised and would refuse to be saved.
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
    model.is_quantized = False  # pyright: ignore[reportArgumentType]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
    try:
        unfinished.replace(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(unfinished)  # another process was faster
    return folder
