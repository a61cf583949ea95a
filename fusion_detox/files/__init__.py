"""Read and write files safely.

- ``atomic``: files and folders that are either complete or unchanged.
- ``locks``: one process at a time per output.
- ``journal``: append-only JSON Lines that an interrupted run resumes.
- ``tables``: rows of JSON Lines, JSON, CSV, TSV and text files, and of hub data sets.
- ``models``: models and tokenizers by folder or hub id, without code from a repository.
- ``packaged_targets``: real pretrained models from the Python package index.
- ``untrusted``, ``config_checks``: files that others wrote, checked before others read them.
- ``cache_root``: the user's cache folder.
- ``hub``: whether the hub answers.
- ``foreign_formats``: messages for GGUF, ONNX and other files that are not loaded.
- ``printable``: text of others without terminal escapes.
- ``portable``: folders that transformers 4 and 5 both read.
- ``loading_errors``: errors while loading them, each explained in one sentence.
- ``cards``: model cards from templates.
- ``fingerprints``, ``versions``, ``differences``: facts for records and for messages.
- ``forks``: locks that still work in a forked process.

Every other subpackage may import this one; it imports only :mod:`fusion_detox.errors` and
:mod:`fusion_detox.config`.
"""
