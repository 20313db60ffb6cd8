"""The demo as a Space starts it: `SELF1E_VERSION` names the checkpoint, a hub id or a folder; see README.md beside."""

import os
import sys

from self1e.cli import main

version = os.environ.get("SELF1E_VERSION")
if not version:
    sys.exit("SELF1E_VERSION is not set: give it the hub id or the folder of a trained checkpoint")
host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")  # the names that Gradio itself and Spaces use
port = os.environ.get("GRADIO_SERVER_PORT", "7860")
sys.exit(main(["demo", "--version", version, "--host", host, "--port", port]))
