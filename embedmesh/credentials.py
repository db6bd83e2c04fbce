"""The keys that the first start made, in a file for the person at this machine."""

from pathlib import Path

import msgspec

from embedmesh.rules.errors import SetupError

BOOTSTRAP = "bootstrap.json"


class Credentials(msgspec.Struct, frozen=True):
    """`bootstrap.json` (mode 0600): the keys that the first start made, for the person at this machine."""

    base_url: str
    api_key: str
    admin_key: str
    account: str


def read_bootstrap(data_dir: Path) -> Credentials | None:
    """The credentials of the first start in `data_dir`; None where there are none. Raises SetupError, in one line."""
    file = data_dir / BOOTSTRAP
    try:
        return msgspec.json.decode(file.read_bytes(), type=Credentials)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SetupError(f"{file} cannot be read ({error.strerror}). Run as the user who started the server.") from None
    except msgspec.DecodeError:
        raise SetupError(f"{file} is damaged. Restore it, or move it away: the next start makes new keys.") from None
