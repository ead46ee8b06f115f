"""The exceptions people see. Each message names the file or setting at fault and the way out.

What belongs here: exception types. What does not: the code that raises or renders them.
"""


class ScopeAtlasError(Exception):
    """Base of every error this project raises on purpose; the CLI prints it as one line and exits with 2."""


class ConfigError(ScopeAtlasError):
    """A setting is missing, contradictory or unusable."""


class StoreError(ScopeAtlasError):
    """The store cannot be read or written, or holds something that is not what its record says."""


class CorpusError(ScopeAtlasError):
    """A source of documents is missing, unreadable or empty."""


class DictionaryError(ScopeAtlasError):
    """The weights of a sparse dictionary are damaged, of the wrong shape, or of no known format."""


class SubjectModelError(ScopeAtlasError):
    """The subject model cannot be loaded, or has no such site."""


class RunnerError(ScopeAtlasError):
    """A shard's work failed, its workers were lost time and again, or no worker could be had."""


class ExchangeError(ScopeAtlasError):
    """Files of another tool are missing, damaged, or not of the layout or the SAE that they are taken for."""


class NotReadyError(ScopeAtlasError):
    """A stage was asked for before the stage that it reads has finished."""


class UnknownSaeError(ScopeAtlasError):
    """No SAE of that key or name is known here."""


class ExplainerError(ScopeAtlasError):
    """The LLM could not be reached, or does not keep to the JSON schema it was given."""


class LeakError(ScopeAtlasError):
    """Text of another split was given to a test."""


class AtlasError(ScopeAtlasError):
    """The atlas is missing, or holds no such feature."""


def said(error: Exception) -> str:
    """An error as one line for people: ours say what to do, any other is named by its type."""
    first = (str(error).strip().splitlines() or [""])[0]
    return str(error) if isinstance(error, ScopeAtlasError) else f"{type(error).__name__}: {first}"
