"""``secateur watch``."""

import argparse
import json
from pathlib import Path

from secateur.report.live import Watched
from secateur.report.serving import Server, serve


def run(request: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C, or print the list of runs once."""
    if request.json:
        found = Watched([Path(folder) for folder in request.folders]).listing()
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    serve(request.folders, request.host, request.port, _begun)
    print("secateur: watch ended; the runs go on.", flush=True)
    return 0


def _begun(server: Server) -> None:
    print(f"watching at {server.url} (Ctrl-C ends it)", flush=True)
    if not server.local:
        print("everyone who can reach this machine there can read the figures of these runs", flush=True)
