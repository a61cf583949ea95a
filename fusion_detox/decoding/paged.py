"""A warning where ``generate`` drops logits processors without a word of its own."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


class _PagedFilter(logging.Filter):
    """Lets every record pass, and adds the warning to the one that announces paged generation."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "cache_implementation=paged" in record.getMessage():
            logger.warning(
                "generate(cache_implementation='paged') drops every logits processor, so nothing "
                "is fused: leave cache_implementation out, or use generate_batch of "
                "fusion_detox.integrations.continuous_batching"
            )
        return True


@functools.cache
def watch_paged_generation() -> None:
    """Warns from now on, in this process, when ``generate`` switches to continuous batching.

    A dropped processor is never called and could not say so itself. ``generate`` announces the
    switch in its log, the one trace that the public interface leaves; with the log of
    ``transformers`` at the level of errors there is no warning either.
    """
    logging.getLogger("transformers.generation.utils").addFilter(_PagedFilter())
