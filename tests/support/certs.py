"""A throw-away certificate authority and certificates from it, by the `openssl` command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_DAYS = "7"
_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Certs:
    """Paths: a peer trusts `ca`; `cert` and `key` are valid for 127.0.0.1 and localhost."""

    folder: Path
    ca: Path
    cert: Path
    key: Path
    # Signed by the same authority, for a name that no test connects to.
    wrong_host_cert: Path
    wrong_host_key: Path

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.cert, self.key


def make_certs(folder: Path) -> Certs:
    """Make all files in `folder`. Needs openssl."""
    subject = "/CN=HTTP network relay test CA"
    _openssl(
        folder,
        *["req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-days", _DAYS],
        *["-subj", subject, "-addext", "keyUsage=critical,keyCertSign,cRLSign"],
    )
    cert, key = _issue(folder, "server", "IP:127.0.0.1,DNS:localhost")
    wrong_cert, wrong_key = _issue(folder, "wrong-host", "DNS:somewhere-else.test")
    return Certs(folder, folder / "ca.pem", cert, key, wrong_cert, wrong_key)


def _issue(folder: Path, name: str, alt_names: str) -> tuple[Path, Path]:
    (folder / f"{name}.ext").write_text(
        f"subjectAltName={alt_names}\nbasicConstraints=critical,CA:FALSE\n"
        "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    request = [*_NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"]
    _openssl(folder, "req", *request)
    _openssl(
        folder,
        *["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"],
        *["-CAcreateserial", "-extfile", f"{name}.ext", "-days", _DAYS, "-out", f"{name}.pem"],
    )
    return folder / f"{name}.pem", folder / f"{name}.key"


def _openssl(folder: Path, *args: str) -> None:
    result = subprocess.run(["openssl", *args], cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"openssl {args[0]} failed: {result.stderr}")
