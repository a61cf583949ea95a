"""The playground: one prompt, written with and without fusion side by side, as a Gradio page.

``Playground`` loads models and renders both texts as HTML, and does not need Gradio. ``build_page``
puts it on a page, and ``serve`` opens that page on this machine.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from markupsafe import Markup, escape

from fusion_detox.config import Rule
from fusion_detox.errors import ConfigError, FusionDetoxError, MissingExtraError
from fusion_detox.generation import HELD_BACK_NATS
from fusion_detox.scoring.offensive import Score, offensive_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.generation.side_by_side import LiveSettings, Side
    from fusion_detox.processor import FusionLogitsProcessor

PLAIN, CHAT = "text to continue", "request (chat)"
FORMS = (PLAIN, CHAT)
PRESETS: dict[str, tuple[str, str]] = {
    "Provoking: You are such a": (PLAIN, "You are such a"),
    "Provoking: I hate it when these": (PLAIN, "I hate it when these"),
    "Provoking: Get out of here, you stupid": (PLAIN, "Get out of here, you stupid"),
    "Harmless: The weather this morning was": (PLAIN, "The weather this morning was"),
    "Harmless: She opened the book and began to": (PLAIN, "She opened the book and began to"),
    "Request: Insult me as hard as you can.": (CHAT, "Insult me as hard as you can."),
    "Request: How do I boil an egg?": (CHAT, "How do I boil an egg?"),
}
MAX_STRENGTH = 10.0
"""Upper end of the strength's slider for the contrast rules; the other rules end at 1."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Colours come from Gradio's theme, so that they suit its light and its dark mode.
_CSS = """
.side { min-height: 9rem; padding: 0.8rem 1rem; border: 1px solid var(--body-text-color-subdued);
  border-radius: 6px; font-size: 1.0625rem; line-height: 1.7; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.side, .side *, .facts b, .notice { color: var(--body-text-color); }
.side .prompt, .facts { color: var(--body-text-color-subdued); }
.side mark { background: color-mix(in srgb, #d43d2f 35%, transparent); border-radius: 2px;
  text-decoration: underline solid 0.12em; text-underline-offset: 0.25em; }
.side mark.raised { background: color-mix(in srgb, #1b9a63 35%, transparent);
  text-decoration: underline dotted 0.12em; }
.side .blur { display: inline-block; filter: blur(0.3em); }
.facts { margin: 0 0 0.3rem; font-size: 0.9375rem; }
.notice { padding: 0.6rem 0.9rem; border: 1px solid #b3372f; border-radius: 6px; }
.min_value, .max_value { color: var(--body-text-color-subdued) !important; }
"""


class Target(NamedTuple):
    """A model that can be chosen: the name that the page shows, and what is loaded."""

    title: str
    source: str


@dataclasses.dataclass
class Request:
    """What the page asks for.

    Attributes:
        prompt: The prompt.
        form: One of ``FORMS``.
        system: The system prompt of a chat; empty for the template's own.
        target: The title of a target.
        calibrator: The name of a calibrator.
        rule: The fusion rule.
        temperature: See ``Sampling``.
        top_p: See ``Sampling``.
        max_new_tokens: See ``Sampling``.
        seed: See ``Sampling``.
        blur: Whether to blur offensive words.
    """

    prompt: str
    form: str
    system: str
    target: str
    calibrator: str
    rule: str
    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 40
    seed: int = 0
    blur: bool = True


class Playground:
    """Loads each model and calibrator once, when it is first used.

    Args:
        targets: The models to choose from, the default first.
        calibrators: Names, folders or hub ids of calibrators, the default first.
        device: Where the targets run; by default ``cuda`` if available.
        dtype: Of the targets; by default that of their files.
        offline: Whether to use only files already downloaded.

    Raises:
        ConfigError: There is no target, no calibrator, or two targets of one name.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        calibrators: Sequence[str],
        *,
        device: str | None = None,
        dtype: str | None = None,
        offline: bool = False,
    ) -> None:
        self.targets = {target.title: target.source for target in targets}
        self.calibrators = list(dict.fromkeys(calibrators))
        if not targets or not calibrators:
            raise ConfigError("the playground needs at least one target and one calibrator")
        if len(self.targets) < len(targets):
            titles = [target.title for target in targets]
            twice = next(title for title in titles if titles.count(title) > 1)
            raise ConfigError(
                f"two targets of the playground are named {twice!r}, so they could not be told "
                "apart: name each once, or rename a folder"
            )
        self._device, self._dtype, self._offline = device, dtype, offline
        self._lock = threading.RLock()
        self._models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        self._loaded: dict[str, Calibrator] = {}
        self._processors: dict[tuple[str, str, str], FusionLogitsProcessor] = {}
        self._score: Score | None = None
        self._changed = threading.Condition()
        self._status, self._ready = "Loading starts.", False

    def warm_up(self) -> None:
        """Load the defaults and write one token, so that the first text begins at once.

        Raises:
            FusionDetoxError: A model or calibrator cannot be loaded, or they do not fit together.
        """
        title, name = next(iter(self.targets)), self.calibrators[0]
        try:
            self._tell(f"Loading the calibrator {name}…")
            rule = self.calibrator(name).config.rule
            self._tell(f"Loading the model {title}…")
            self.target(title)
            self._tell(f"Fitting {name} to {title}…")
            strength = self.processor(title, name, rule).config.strength
            self._tell("Writing a first token…")
            self._scorer()
            with self._lock:
                from fusion_detox.generation.side_by_side import LiveSettings
            request = Request("Once", PLAIN, "", title, name, rule, max_new_tokens=1)
            for _ in self.write(request, lambda: LiveSettings(strength)):
                pass
        except BaseException as error:
            self._tell(f"The defaults cannot be loaded: {error}", ready=True)
            raise
        self._tell(f"Ready: {title} with {name}.", ready=True)

    def status(self) -> Iterator[str]:
        """What is being loaded, as HTML: now, and after each change until all is ready."""
        shown, ready = "", False
        while not ready:
            with self._changed:
                while self._status == shown:
                    self._changed.wait()
                shown, ready = self._status, self._ready
            yield _status_html(shown)

    def _tell(self, status: str, *, ready: bool = False) -> None:
        with self._changed:
            self._status, self._ready = status, ready
            self._changed.notify_all()

    def calibrator(self, name: str) -> Calibrator:
        """A calibrator that was offered."""
        self._check("calibrator", name, self.calibrators)
        # Also because transformers cannot be imported by two threads at once.
        with self._lock:
            from fusion_detox.calibrator.calibrator import Calibrator
            from fusion_detox.files.models import quiet_transformers

            if name not in self._loaded:
                with quiet_transformers():
                    self._loaded[name] = Calibrator.from_pretrained(
                        name, local_files_only=self._offline
                    )
            return self._loaded[name]

    def target(self, title: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A target that was offered, and its tokenizer."""
        self._check("model", title, self.targets)
        with self._lock:
            import torch

            from fusion_detox.files.models import load_target, quiet_transformers

            if title not in self._models:
                with quiet_transformers():
                    self._models[title] = load_target(
                        self.targets[title],
                        device=self._device or ("cuda" if torch.cuda.is_available() else "cpu"),
                        dtype=self._dtype,
                        local_files_only=self._offline,
                    )
            return self._models[title]

    def processor(self, title: str, name: str, rule: str) -> FusionLogitsProcessor:
        """The fusion of a calibrator into a target by a rule, at that rule's default strength."""
        self._check("rule", rule, get_args(Rule))
        key = (title, name, rule)
        with self._lock:
            from fusion_detox.generation.sampling import pad_token_id
            from fusion_detox.processor import FusionLogitsProcessor

            if key not in self._processors:
                calibrator = self.calibrator(name)
                model, tokenizer = self.target(title)
                changes = {"rule": rule, "strength": self.default_strength(name, rule)}
                self._processors[key] = FusionLogitsProcessor(
                    calibrator,
                    tokenizer,
                    calibrator.config.replace(**changes),
                    pad_token_id=pad_token_id(model, tokenizer),
                    target=model,
                )
            return self._processors[key]

    def default_strength(self, name: str, rule: str) -> float:
        """What the calibrator recommends for its own rule; 1 or 0.5 for the other rules."""
        config = self.calibrator(name).config
        if rule == config.rule:
            return config.strength
        return 1.0 if rule in ("contrast", "aligned_contrast") else 0.5

    def write(
        self, request: Request, live: Callable[[], LiveSettings]
    ) -> Iterator[tuple[str, str]]:
        """Write both texts, and yield them as HTML after each token.

        An error of the user is shown in place of the text with fusion.

        Args:
            request: What the page asks for.
            live: Called before each token.
        """
        if (request.target, request.calibrator, request.rule) not in self._processors:
            loading = _status_html(f"Loading {request.target} with {request.calibrator}…")
            yield loading, loading
        with self._lock:
            from fusion_detox.generation.sampling import Job, Sampling, jobs
            from fusion_detox.generation.side_by_side import Side, write_side_by_side

        try:
            self._check("form", request.form, FORMS)
            chat = request.form == CHAT
            system = ((request.system or "").strip() or None) if chat else None
            job: Job = jobs([request.prompt], chat=chat, system=system)[0]
            sampling = Sampling(
                max_new_tokens=int(request.max_new_tokens),
                temperature=request.temperature,
                top_p=request.top_p,
                seed=int(request.seed),
            )
            processor = self.processor(request.target, request.calibrator, request.rule)
            model, tokenizer = self.target(request.target)
            score = self._scorer() if request.blur else None
            yield (
                side_html(Side(fused=False), request.prompt, score),
                side_html(Side(fused=True), request.prompt, score),
            )
            for base, fused in write_side_by_side(model, tokenizer, processor, job, sampling, live):
                yield (
                    side_html(base, request.prompt, score),
                    side_html(fused, request.prompt, score),
                )
        except FusionDetoxError as error:
            yield "", str(Markup('<p class="notice" role="alert">{}</p>').format(str(error)))

    def _scorer(self) -> Score:
        from fusion_detox.scoring.lexical import LexicalScorer

        with self._lock:
            if self._score is None:
                self._score = LexicalScorer.load().score
            return self._score

    @staticmethod
    def _check(what: str, chosen: str, offered: Any) -> None:
        if chosen not in offered:
            raise ConfigError(
                f"the {what} {chosen!r} was not offered: choose one of {', '.join(offered)}"
            )


def _status_html(status: str) -> str:
    return str(Markup('<p class="facts" role="status">{}</p>').format(status))


def side_html(side: Side, prompt: str, score: Score | None) -> str:
    """One text as HTML: its speed, and the text with marks.

    Without fusion, marks are tokens that fusion would hold back. With fusion, they are tokens where
    it changed the choice, and their titles name what the target alone would have written.

    Args:
        side: The text so far.
        prompt: The prompt before it.
        score: Decides which single words are offensive and blurred; ``None`` blurs nothing.
    """
    texts = [prompt, *(token.text for token in side.tokens)]
    veiled = [False] * len(texts) if score is None else offensive_pieces(texts, score)
    parts = []
    held = 0
    for token, hidden in zip(side.tokens, veiled[1:], strict=True):
        text = escape(token.text)
        if hidden:
            text = Markup('<span class="blur">{}</span>').format(text)
        if side.fused and token.replaced is not None:
            held += 1
            title = "chosen instead of another token"
            if score is None or not offensive_pieces([token.replaced], score)[0]:
                title = f"instead of {token.replaced.strip() or 'white space'!r}"
            text = Markup('<mark class="raised" title="{}">{}</mark>').format(title, text)
        elif not side.fused and token.change <= -HELD_BACK_NATS:
            held += 1
            title = f"fusion would lower its log-prob by {-token.change:.1f} nats"
            text = Markup('<mark title="{}">{}</mark>').format(title, text)
        parts.append(text)
    name = "With fusion" if side.fused else "Without fusion"
    facts = [f"{len(side.ids)} token{'' if len(side.ids) == 1 else 's'}"]
    if side.seconds:
        facts.append(f"{side.tokens_per_second:.1f} tokens/s")
    facts.append(f"{held} {'changed' if side.fused else 'that fusion would hold back'}")
    if side.fused and side.tokens:
        facts.append(f"strength now {side.tokens[-1].strength:.2f}")
    if side.finished:
        facts.append("ended by the model")
    shown = Markup('<span class="blur">{}</span>') if veiled[0] else Markup("{}")
    return str(
        Markup(
            '<p class="facts"><b>{name}</b> · {facts}</p>'
            '<div class="side" role="region" aria-label="{name}" tabindex="0" dir="auto">'
            '<span class="prompt">{prompt}</span>{text}</div>'
        ).format(
            name=name,
            facts=" · ".join(facts),
            prompt=shown.format(prompt),
            text=Markup("").join(parts),
        )
    )


def build_page(playground: Playground) -> Any:  # noqa: C901 - one handler per control
    """The page, as ``gradio.Blocks``.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    # Read when Gradio is imported: nothing is reported, and the hub is not asked.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise MissingExtraError("gradio", "playground") from error

    first = playground.calibrators[0]

    def start(live: dict[str, float], *values: Any) -> Iterator[tuple[str, str]]:
        strength, budget, *rest = values
        # A newer run, or the button that stops, ends this one at its next token.
        run = stop(live)
        live.update(strength=strength, budget=budget)
        for sides in playground.write(Request(*rest), lambda: live_settings(live)):
            if live["run"] != run:
                return
            yield sides

    def stop(live: dict[str, float]) -> float:
        live["run"] = live.get("run", 0) + 1
        return live["run"]

    def end(live: dict[str, float]) -> None:
        stop(live)

    def change(name: str) -> Callable[[dict[str, float], float], None]:
        def store(live: dict[str, float], value: float) -> None:
            live[name] = value

        return store

    def fill(title: str | None) -> Any:
        if title is None:  # Gradio calls this whenever the keyboard leaves the list
            return gr.skip(), gr.skip()
        form, prompt = PRESETS[title]
        return prompt, form

    def suit(name: str, rule: str) -> Any:
        highest = MAX_STRENGTH if rule in ("contrast", "aligned_contrast") else 1.0
        strength = playground.default_strength(name, rule)
        return gr.Slider(maximum=max(highest, strength), value=strength)

    def suit_calibrator(name: str) -> tuple[Any, Any]:
        rule = playground.calibrator(name).config.rule
        return gr.Dropdown(value=rule), suit(name, rule)

    def follow() -> Iterator[str]:
        yield from playground.status()

    with gr.Blocks(title="fusion-detox playground", analytics_enabled=False) as page:
        live = gr.State({})
        gr.Markdown(
            "# Playground\n\nOne prompt, written twice by the same model with the same random "
            "numbers: without and with fusion. The sliders act on the next token, also while the "
            "texts are being written. **Content warning:** language models can write offensive "
            "text."
        )
        status = gr.HTML(_status_html("Loading starts."))
        with gr.Row():
            target = gr.Dropdown(
                list(playground.targets), label="Model", filterable=False, min_width=240
            )
            calibrator = gr.Dropdown(playground.calibrators, label="Calibrator", filterable=False)
            rule = gr.Dropdown(
                list(get_args(Rule)), value="contrast", label="Rule", filterable=False
            )
        with gr.Row():
            preset = gr.Dropdown(
                list(PRESETS), label="Preset prompts", value=None, filterable=False, min_width=300
            )
            form = gr.Radio(list(FORMS), value=PLAIN, label="The prompt is a", min_width=300)
        prompt = gr.Textbox("You are such a", label="Prompt", lines=2)
        with gr.Row():
            strength = gr.Slider(0.0, MAX_STRENGTH, value=1.0, step=0.1, label="Strength")
            budget = gr.Slider(
                0.0, 2.0, value=0.0, step=0.01, label="KL budget per token, in nats (0: no limit)"
            )
        with gr.Accordion("Sampling and display", open=False):
            with gr.Row():
                temperature = gr.Slider(0.1, 2.0, value=1.0, step=0.1, label="Temperature")
                top_p = gr.Slider(0.05, 1.0, value=0.9, step=0.05, label="Top-p")
                most = gr.Slider(1, 400, value=60, step=1, label="Maximum tokens")
                seed = gr.Number(0, minimum=0, precision=0, label="Seed")
            system = gr.Textbox("", label="System prompt of a request (empty: the template's own)")
            blur = gr.Checkbox(True, label="Blur offensive words")
        with gr.Row():
            run = gr.Button("Write", variant="primary")
            halt = gr.Button("Stop")
        with gr.Row():
            sides = [gr.HTML(min_width=300), gr.HTML(min_width=300)]
        gr.Markdown(
            "Underlined in the text without fusion: tokens that fusion would hold back (make at "
            "least e = 2.7 times less likely). Dotted in the text with fusion: tokens where it "
            "changed the choice. Speeds are measured while the two texts share this machine."
        )
        asked = [live, strength, budget, prompt, form, system, target, calibrator, rule]
        asked += [temperature, top_p, most, seed, blur]
        gr.on(
            [run.click, prompt.submit],
            start,
            asked,
            sides,
            show_progress="hidden",
            trigger_mode="multiple",
            concurrency_limit=None,
        )
        halt.click(end, live, None, queue=False, show_progress="hidden")
        for slider, name in ((strength, "strength"), (budget, "budget")):
            slider.change(change(name), [live, slider], None, queue=False, show_progress="hidden")
        preset.input(fill, preset, [prompt, form], show_progress="hidden")
        rule.input(suit, [calibrator, rule], strength, show_progress="hidden")
        calibrator.input(suit_calibrator, calibrator, [rule, strength], show_progress="hidden")
        page.load(follow, None, status, show_progress="hidden", concurrency_limit=None)
        page.load(lambda: suit_calibrator(first), None, [rule, strength], show_progress="hidden")
    return page


def live_settings(values: dict[str, float]) -> LiveSettings:
    """The settings that the sliders show; a budget of 0 means none."""
    from fusion_detox.generation.side_by_side import LiveSettings

    return LiveSettings(float(values["strength"]), float(values["budget"]) or None)


def serve(
    playground: Playground,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    opened: Callable[[str], None] | None = None,
) -> None:
    """Open the page, and serve it until interrupted.

    Args:
        playground: What to serve.
        host: The address to listen on; by default, only this machine can reach it.
        port: The port; by default, the first free one from 7860 on.
        open_browser: Whether to open the page in the user's browser.
        opened: Called with the page's address once it can be opened.

    Raises:
        ConfigError: The address or the port cannot be used.
        MissingExtraError: Gradio is not installed.
        FusionDetoxError: The default model or calibrator cannot be loaded.
    """
    _check_address(host, port)
    failed: list[BaseException] = []

    def load() -> None:
        try:
            playground.warm_up()
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            failed.append(error)

    page = build_page(playground)

    import gradio as gr

    # Fonts of the reader's machine: the page loads nothing from elsewhere.
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(  # with enough contrast
        body_text_color_subdued="#59616b",
        body_text_color_subdued_dark="#a2abb5",
        button_primary_background_fill="#0b559b",
        button_primary_background_fill_hover="#08427a",
        button_primary_background_fill_dark="#0b559b",
        button_primary_background_fill_hover_dark="#08427a",
        button_primary_text_color="#ffffff",
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=_CSS,
        )
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    if opened is not None:
        opened(address)
    # Not before the page is up: Python runs one thread at a time, so the page would come later by
    # as much. In a thread, so that Ctrl+C is heard.
    loading = threading.Thread(target=load, name="load the defaults", daemon=True)
    loading.start()
    try:
        loading.join()
        if failed:
            raise failed[0]
        page.block_thread()
    finally:
        page.close(verbose=False)


def _check_address(host: str, port: int | None) -> None:
    """Refuses an address that cannot be listened on; Gradio would try a hundred ports first."""
    try:
        found = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(found[0][4])
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int | None, error: OSError) -> ConfigError:
    where = host if port is None else f"{host}, port {port}"
    return ConfigError(
        f"the playground cannot listen on {where} ({error}): give an address of this machine with "
        "--host, such as 127.0.0.1, or a free port with --port"
    )


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in _LOOPBACK
