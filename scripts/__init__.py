"""What the stage scripts stand on: the two diffusers pipelines, ranks, seeds, files and
manifests."""

import sys

try:
    import fcntl  # noqa: F401
    import resource  # noqa: F401
    from datetime import UTC  # noqa: F401
except ImportError as error:
    needs = "error: D4M needs Python 3.11 or newer on Linux, macOS or Windows' WSL"
    here = f"this is Python {sys.version.split()[0]} on {sys.platform} ({error})"
    print(f"{needs}; {here}", file=sys.stderr)
    sys.exit(2)
