"""Codes: what follows from each."""

from pathlib import Path

import pytest

from http_network_relay.wire.codes import Code
from http_network_relay.wire.errors import RelayError


def test_every_code_fits_the_wire() -> None:
    """Lower case and underscores, as docs/protocol.md says."""
    for code in Code:
        assert code.replace("_", "").isalpha()
        assert code.islower()
        assert 1 <= code.exit_code <= 7
        assert str(code) == f"{code}" == "%s" % code == code.value  # noqa: UP031


@pytest.mark.parametrize(
    ("code", "exit_code", "is_retryable"),
    [
        ("usage", 2, False),
        ("unauthorized", 3, False),
        ("client_offline", 4, True),
        ("client_unknown", 4, False),
        ("target_refused", 5, False),
        ("busy", 6, True),
        ("server_unreachable", 6, True),
        ("leg_lost", 1, True),
        ("a_code_of_tomorrow", 1, False),
    ],
)
def test_code_says_the_exit_code_and_whether_to_try_again(
    code: str, exit_code: int, is_retryable: bool
) -> None:
    """An unknown code of a newer peer counts as a loss."""
    error = RelayError(code, "a sentence")
    assert (error.exit_code, error.is_retryable, str(error)) == (
        exit_code,
        is_retryable,
        "a sentence",
    )


def test_every_code_is_on_the_protocol_page() -> None:
    """But those that only this end sees."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text("utf-8")
    local = {"usage", "server_unreachable", "tls_failed", "proxy_failed", "not_a_relay"}
    local |= {"leg_lost", "open_timeout"}
    missing = [code for code in Code if f"`{code}`" not in page and code not in local]
    assert missing == []
