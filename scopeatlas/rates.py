"""What this project measured of a machine, and of what it stores: the numbers that hours and bytes are planned from.

What belongs here: the record and its file. What does not: measuring (`bench/rates.py`), or planning (`planning.py`).
"""

from dataclasses import asdict, dataclass, fields

from scopeatlas.errors import ConfigError
from scopeatlas.storage.files import read_json_if_there, write_json
from scopeatlas.storage.uris import Location

FILE = "rates.json"
"""At the root of a store: the rates of the machine that fills it."""


@dataclass(frozen=True)
class Rates:
    """Measured on one machine; None is not measured.

    machine, subject: what was measured, for people. lm_flop, encoder_flop: floating-point operations a second, counted as
    `ReleaseCost.lm_flop` and `SiteCost.encoder_flop` do. The others a second, all threads at work: cached_nonzeros by
    `activation_cache` beside those operations, sketched_nonzeros and example_features by `feature_examples`,
    labelled_features by labels, scores and index together. bytes_per_nonzero: of activation shards. example_bytes,
    index_bytes: a feature, of examples, and of all that comes after.
    """

    machine: str = ""
    subject: str = ""
    lm_flop: float | None = None
    encoder_flop: float | None = None
    cached_nonzeros: float | None = None
    sketched_nonzeros: float | None = None
    example_features: float | None = None
    labelled_features: float | None = None
    bytes_per_nonzero: float | None = None
    example_bytes: float | None = None
    index_bytes: float | None = None


def write_rates(path: Location, rates: Rates) -> None:
    """Keep rates as JSON, one name a line."""
    write_json(path, asdict(rates))


def read_rates(path: Location) -> Rates | None:
    """Rates as `write_rates` or a person wrote them, or None if there is no such file. Raises StoreError for one that cannot
    be read, ConfigError naming what is wrong in one."""
    body = read_json_if_there(path)
    if body is None:
        return None
    known = {field.name for field in fields(Rates)}
    if not isinstance(body, dict) or body.keys() - known:
        raise ConfigError(f"{path} is not a table of rates; it may hold {', '.join(sorted(known))}")
    for name, value in body.items():
        is_text = name in ("machine", "subject")
        if not isinstance(value, str if is_text else (int, float, type(None))) or (isinstance(value, int | float) and value <= 0):
            raise ConfigError(f"{path}: {name} is {value!r}; write {'text' if is_text else 'a number above 0, or null'}")
    return Rates(**body)
