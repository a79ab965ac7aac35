"""Models by name: `hf://owner/name` or `hf://owner/name@revision` on the Hugging Face hub, anything else a local directory."""

from __future__ import annotations

from pathlib import Path

PREFIX = "hf://"
# Weights that are safetensors, settings and tokenizers; no pickles, no second copies in other formats.
_WANTED = ("*.json", "model*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "README.md")


def local_directory(name: str | Path) -> Path:
    """The directory of a model, downloaded where its name begins with hf://.

    Downloads go through huggingface_hub: into its cache, resumed where they were interrupted, with the token of the environment
    (HF_TOKEN) or of its login. HF_HUB_OFFLINE=1 takes what the cache has.

    Raises ImportError without huggingface_hub, ValueError for a name that is none, and what huggingface_hub raises for a model
    that does not exist or cannot be reached.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    repository, _, revision = text.removeprefix(PREFIX).partition("@")
    if repository.count("/") > 1 or not repository.strip("/"):
        raise ValueError(f"{text} is no name of a model: expected hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f"{text} needs huggingface_hub: pip install gristmill[hub]") from error
    return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(_WANTED)))


def public_name(directory: str | Path) -> str:
    """owner/name of a model in huggingface_hub's cache (models--OWNER--NAME/snapshots/COMMIT), the path itself of any other:
    what others can find it by."""
    parts = Path(directory).parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1)
    return str(directory)
