import pytest

from scopeatlas.errors import ConfigError
from scopeatlas.llm.client import open_client
from scopeatlas.llm.config import OPENAI_URL, ServerConfig


def test_without_a_model_it_is_off():
    assert (ServerConfig().enabled, ServerConfig("m").enabled) == (False, True)


def test_the_url_never_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    assert ServerConfig("m").url == OPENAI_URL


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://me:pass@host/v1", "http://h:x/"])
def test_an_unusable_base_url_is_refused_without_repeating_a_password(url):
    with pytest.raises(ConfigError, match="base_url") as caught:
        ServerConfig("m", url)
    assert "me:pass" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_seconds": 0},
        {"max_concurrency": 0},
        {"max_attempts": 0},
        {"requests_per_minute": 0},
        {"tokens_per_minute": -1},
        {"max_tokens_total": 0},
        {"max_usd_total": 0.0, "usd_per_million_input": 1.0, "usd_per_million_output": 1.0},
        {"max_usd_total": 1.0},
        {"usd_per_million_input": 1.0},
        {"usd_per_million_cached": 1.0},
        {"usd_per_million_input": -1.0, "usd_per_million_output": 1.0},
        {"temperature": -1.0},
        {"batch": "maybe"},
    ],
)
def test_a_setting_that_could_never_work_is_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings)).split("_million")[0]):
        ServerConfig("m", **settings)


def test_money_is_counted_by_the_three_prices():
    prices = {"usd_per_million_input": 2.0, "usd_per_million_cached": 0.5, "usd_per_million_output": 8.0}
    assert ServerConfig("m", **prices).usd(1_000_000, 500_000, 400_000) == pytest.approx(1.2 + 0.2 + 4.0)


def test_cached_tokens_cost_like_others_where_they_have_no_price():
    config = ServerConfig("m", usd_per_million_input=2.0, usd_per_million_output=8.0)
    assert config.usd(1_000_000, 0, 400_000) == pytest.approx(2.0)


def test_without_prices_nothing_is_said_about_money():
    assert ServerConfig("m").usd(1, 1) is None


@pytest.mark.parametrize(
    ("url", "local"),
    [("http://localhost:1/v1", True), ("http://127.0.0.2/v1", True), ("http://[::1]:2/v1", True), ("http://10.0.0.1/v1", False)],
)
def test_what_is_on_this_machine(url, local):
    assert ServerConfig("m", url).is_local is local


def test_a_missing_key_names_its_variable(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY"):
        open_client(ServerConfig("m", "https://llm.example/v1", "MY_KEY"))


def test_an_unusable_key_is_not_repeated(monkeypatch):
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(ConfigError, match="MY_KEY") as caught:
        ServerConfig("m", "https://llm.example/v1", "MY_KEY").api_key()
    assert "schl" not in str(caught.value)


def test_offline_refuses_hosts_that_are_not_this_machine(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    open_client(ServerConfig("m", "http://localhost:1/v1", offline=True))
    with pytest.raises(ConfigError, match="offline"):
        open_client(ServerConfig("m", offline=True))
