"""`dcvit push`: upload a saved model to the Hugging Face hub."""

import argparse
from typing import Any

from dcvit.artifacts.hub import push_to_hub
from dcvit.cli.command import Command
from dcvit.runtime.progress import TerminalProgress

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a folder that dcvit compress wrote")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def _run(arguments: argparse.Namespace, progress: TerminalProgress) -> dict[str, Any]:
    address = push_to_hub(arguments.folder, arguments.repo_id, private=arguments.private)
    return {"repo_id": arguments.repo_id, "address": address}


def _show(values: dict[str, Any]) -> str:
    return f"Uploaded to {values['address']}: timm.create_model('hf-hub:{values['repo_id']}', pretrained=True)."


COMMAND = Command(
    name="push",
    summary="upload a saved model to the Hugging Face hub",
    description=(
        "Upload a saved model with a newly written model card, and no other file of the folder. "
        "Log in first: hf auth login."
    ),
    run=_run,
    show=_show,
    add_arguments=_add_arguments,
)
