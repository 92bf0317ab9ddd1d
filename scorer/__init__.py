"""Pack a corpus into rows and fill in a reference's log-probs: Ray and vLLM live here."""

import os
from pathlib import Path

# Ray reads these when it is first imported, which is after this line.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
_has_token = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
if os.environ.get("RAY_ADDRESS") and (_has_token or (Path.home() / ".ray" / "auth_token").exists()):
    # `ray start` asks for the token where one exists, but a client with an address does not send it by itself;
    # a cluster without authentication takes no notice of it
    os.environ.setdefault("RAY_AUTH_MODE", "token")
