"""The app as Gradio shows it: the tabs, their fields, and which function of the engine each button calls.

Nothing is computed here. Handlers are generators, of which Gradio shows each value as it comes.
"""

import html
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import gradio as gr
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .engine import ANCESTRAL, COPIES, FEW, FITTED, MANY, MOST_IMAGES, SIDE, TABS, TERMS, WEIGHTS, Bound, Engine, Sampling

CSS = ".pixels img, .pixels canvas {image-rendering: pixelated} footer {opacity: 0.6}"
HEIGHT = 480
ROUNDS = 2  # of the likelihood, by default
EXAMPLES = 4  # prompts that are offered, the shortest
USERS = 64  # who wait at once; further ones are told that it is full
KEPT = 3600  # seconds that uploads and pictures stay on the disk
TOP_SEED = 2**31 - 1


def reported(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The handler, whose refusals are shown to the user and are no errors of the server."""

    @wraps(handler)
    def run(*arguments: Any) -> Iterator[Any]:
        try:
            yield from handler(*arguments)
        except (ValueError, FloatingPointError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return run


def build(engine: Engine, examples: Sequence[str] = ()) -> gr.Blocks:
    """The app of a model. `examples` are prompts to offer."""
    screens = (_draw, _forward, _inpaint, _interpolate, _likelihood)
    with gr.Blocks(title=engine.name, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as app:
        gr.Markdown(f"# {html.escape(engine.name)}\nA denoising diffusion model (DDPM): {html.escape(engine.facts)}.")
        condition = _condition(engine, examples)
        for tab, screen in zip(TABS, screens, strict=True):
            with gr.Tab(tab):
                if reason := engine.why_not(tab):
                    gr.Markdown(reason)
                else:
                    screen(engine, condition)
    return app.queue(max_size=USERS, default_concurrency_limit=None)


# ---- fields ---------------------------------------------------------------------------------------------


def _condition(engine: Engine, examples: Sequence[str]) -> list[gr.components.Component]:
    """Fields of what the model is asked for, above all tabs, and guidance as the last."""
    asked, scale = [], gr.Number(1.0, visible=False)
    with gr.Row(visible=engine.kind != "none"):
        if engine.kind == "text":
            asked = [gr.Textbox(label="Prompt", value=next(iter(examples), ""), max_length=1000, scale=4, elem_id="prompt")]
        elif engine.kind == "class":
            nothing = [("any", None)] if engine.goes_without else []
            choices = [(str(each), each) for each in engine.classes]
            asked = [gr.Dropdown([*choices, *nothing], value=choices[0][1], label="Class", scale=2, elem_id="class")]
        elif engine.kind == "vector":
            asked = [gr.Number(mean, label=name) for name, mean in engine.numbers.items()]
        if engine.goes_without:
            scale = gr.Slider(0, 10, 2.0, step=0.1, label="Guidance", scale=2)
    if engine.kind == "text" and len(examples) > 1:
        gr.Examples([[each] for each in sorted(examples, key=len)[:EXAMPLES]], asked, label="Prompts as in training")
    return [*asked, scale]


def _sampling(engine: Engine, samplers: Sequence[str], wanted: int = FEW) -> list[gr.components.Component]:
    """Fields of a `Sampling`; the choices of network calls follow the sampler."""
    first = ANCESTRAL if wanted == MANY and ANCESTRAL in samplers else samplers[0]

    def choices(name: str) -> list[tuple[str, int]]:
        calls = engine.samplers[name][1]
        return [(f"{each}, the full chain" if each == engine.total else str(each), each) for each in calls]

    def of_sampler(name: str) -> gr.Dropdown:
        return gr.Dropdown(choices(name), value=engine.default_calls(name, wanted))

    with gr.Row():
        sampler = gr.Dropdown(list(samplers), value=first, label="Sampler", min_width=180, scale=2)
        calls = gr.Dropdown(choices(first), value=engine.default_calls(first, wanted), label="Network calls", min_width=100)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=TOP_SEED, min_width=90)
    calls.preprocess = lambda number: number  # the engine checks it: a client of the API may name any sampler beside it
    calls.api_info = lambda: {"type": "integer"}
    sampler.change(of_sampler, sampler, calls, queue=False, api_visibility="private")
    return [sampler, calls, seed]


def _pictures(height: int | None = HEIGHT) -> gr.Image:
    how = {"show_label": False, "interactive": False, "elem_classes": "pixels", "buttons": ["download", "fullscreen"]}
    return gr.Image(label="Result", format="png", height=height, **how)


def _upload(engine: Engine, label: str, condition: Sequence[Any]) -> gr.Image:
    """A picture to upload, shown as the model sees it, or to let the model draw, another each time."""
    how = {"format": "png", "height": HEIGHT // 2, "elem_classes": "pixels", "buttons": ["download"]}
    picture = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], **how)
    picture.preprocess = lambda file: file and file.path  # as uploaded: the engine reads it, where Gradio would decode it first

    @reported
    def fit(path: str | None) -> Iterator[Any]:
        yield _own_file(engine.show(engine.read(path)))

    @reported
    def drawn(*asked: Any) -> Iterator[Any]:
        first = next(iter(engine.samplers))
        sampling = Sampling(first, engine.default_calls(first), secrets.randbelow(TOP_SEED))
        *_, (_, images) = engine.draw(_request(engine, asked), sampling)
        yield _own_file(engine.show(images))

    if not engine.display.stretch:  # a picture of the screen has 8 bits
        picture.upload(fit, picture, picture, api_visibility="private", show_progress="hidden")
    if not engine.why_not(TABS[0]):
        button = gr.Button("Let the model draw it", size="sm")
        button.click(drawn, condition, picture, api_visibility="private", concurrency_id="model")
    return picture


def _request(engine: Engine, asked: Sequence[Any]) -> Any:
    return engine.request(asked[:-1], asked[-1])


def _runs(handler: Callable, fields: Sequence[Any], result: Any, words: str, name: str, *triggers: Any) -> None:
    """A button that runs the handler into the result and a line below it, and one that stops it. The likelihood runs beside
    all else, of which one runs at a time.
    """
    with gr.Row():
        button, stop = gr.Button(words, variant="primary"), gr.Button("Stop", scale=0, min_width=90)
    line, alone = gr.Markdown(), {"concurrency_limit": 1, "concurrency_id": name if name == "likelihood" else "model"}
    running = gr.on([button.click, *triggers], reported(handler), list(fields), [result, line], api_name=name, **alone)
    stop.click(None, cancels=running, api_visibility="private")


def _shown(steps: Iterator[tuple[int, Any]], show: Callable[[Any], Any]) -> Iterator[Any]:
    for calls, images in steps:
        picture = show(images)
        yield _own_file(picture), f"x_t after {calls} network calls"
    yield _own_file(picture), f"Done in {calls} network calls."


def _own_file(picture: Image.Image) -> Image.Image:
    """The picture with a mark: Gradio names files by their content, and writes over one that is just being downloaded."""
    picture.info["shown"] = secrets.token_hex(8)
    return picture


# ---- tabs -----------------------------------------------------------------------------------------------


def _draw(engine: Engine, condition: list) -> None:
    with gr.Row():
        with gr.Column():
            sampling = _sampling(engine, list(engine.samplers))
            count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Pictures")
            place = gr.Column()
        result = _pictures()

    def draw(count: int, sampler: str, calls: int, seed: int, *asked: Any) -> Iterator[Any]:
        steps = engine.draw(_request(engine, asked), Sampling(sampler, calls, seed), count)
        return _shown(steps, engine.show)

    with place:
        also = [condition[0].submit] if engine.kind == "text" else []
        _runs(draw, [count, *sampling, *condition], result, "Draw", "draw", *also)
        fitted = f" The *{FITTED}* sampler is deterministic, and exists for these numbers of calls only."
        said = "From pure noise, step by step. The same seed gives the same pictures."
        gr.Markdown(said + fitted * (FITTED in engine.samplers))


def _forward(engine: Engine, condition: list) -> None:
    with gr.Row():
        with gr.Column():
            picture = _upload(engine, "Picture x_0", condition)
            t = gr.Slider(-1, engine.total - 1, engine.total // 4, step=1, label="Timestep t (-1 is the picture itself)")
            line = gr.Markdown(latex_delimiters=[{"left": "$", "right": "$", "display": False}])
        result = _pictures()

    @reported
    def noise(path: str | None, t: int) -> Iterator[Any]:
        found = engine.noised(engine.read(path), t)
        snr = "∞" if not found.noise else f"{(found.signal / found.noise) ** 2:.3g}"
        mixed = rf"{found.signal:.4f}\,x_0 + {found.noise:.4f}\,\tilde z"
        formula = rf"$x_t = \sqrt{{\bar\alpha_t}}\,x_0 + \sqrt{{1-\bar\alpha_t}}\,\tilde z = {mixed}$"
        more = f"Report eq. 4.10. The ratio of signal to noise is {snr}. Values beyond black and white are cut off."
        yield _own_file(engine.show(found.x / 2 + 0.5)), f"{formula}\n\n{more}"

    def if_given(path: str | None, t: int) -> Iterator[Any]:
        yield from noise(path, t) if path else [(None, "")]

    gr.on([t.change, picture.change], if_given, [picture, t], [result, line], api_name="noise", trigger_mode="always_last",
          show_progress="hidden")  # fmt: skip


def _inpaint(engine: Engine, condition: list) -> None:
    height, width = engine.size
    factor = max(1, math.ceil(SIDE / max(height, width)))  # as the picture is shown
    thick = max(factor, SIDE // 12)  # the radius of the brush
    with gr.Row():
        with gr.Column():
            picture = _upload(engine, "Picture", condition)
            sampling = _sampling(engine, list(engine.samplers), MANY)
            count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Pictures")
            place = gr.Column()
        with gr.Column():
            editor = gr.ImageEditor(
                label="Brush over what is to be painted anew", type="numpy", sources=(), transforms=(), layers=False,
                brush=gr.Brush(default_size=thick, colors=["#ff2d95"], color_mode="fixed"), eraser=gr.Eraser(thick),
                canvas_size=(width * factor, height * factor), fixed_canvas=True, elem_classes="pixels", buttons=[],
                height=HEIGHT, format="png",
            )  # fmt: skip
            result = _pictures(HEIGHT * 3 // 4)

    @reported
    def canvas(path: str | None) -> Iterator[Any]:
        yield None if path is None else _own_file(engine.show(engine.read(path)))

    picture.change(canvas, picture, editor, api_visibility="private", show_progress="hidden")

    def inpaint(path: str | None, edited: dict, count: int, sampler: str, calls: int, seed: int, *asked: Any) -> Iterator[Any]:
        x, painted = engine.read(path), engine.painted((edited or {}).get("layers", []))
        steps = engine.inpaint(x, painted, _request(engine, asked), Sampling(sampler, calls, seed), count)
        return _shown(steps, engine.show)

    with place:
        _runs(inpaint, [picture, editor, count, *sampling, *condition], result, "Paint anew", "inpaint")
        gr.Markdown("What is not painted over stays as it is, to the bit (Lugmayr et al. 2022, without resampling).")


def _interpolate(engine: Engine, condition: list) -> None:
    with gr.Row():
        with gr.Column():
            a = _upload(engine, "Picture a", condition)
        with gr.Column():
            b = _upload(engine, "Picture b", condition)
    with gr.Row():
        t = gr.Slider(0, engine.total - 1, engine.total // 2, step=1, label="Timestep t up to which noise is added")
        sampling = _sampling(engine, engine.editing_samplers, MANY)
    place, result = gr.Column(), _pictures(None)

    def interpolate(a: str, b: str, t: int, sampler: str, calls: int, seed: int, *asked: Any) -> Iterator[Any]:
        x, y = engine.read(a, "picture a"), engine.read(b, "picture b")
        steps = engine.interpolate(x, y, t, _request(engine, asked), Sampling(sampler, calls, seed))
        labels = ["a", *(f"{100 * weight:.0f} %" for weight in WEIGHTS), "b"]

        return _shown(steps, lambda images: engine.show(images, len(labels), labels))

    with place:
        _runs(interpolate, [a, b, t, *sampling, *condition], result, "Mix", "interpolate")
        gr.Markdown(
            "Both pictures get the same noise, up to t, are mixed, and denoised (Ho et al. 2020, figure 8). The higher t, the "
            "freer the result."
        )


def _likelihood(engine: Engine, condition: list) -> None:
    with gr.Row():
        with gr.Column():
            picture = _upload(engine, "Picture", condition)
            rounds = gr.Slider(1, 16, ROUNDS, step=1, label=f"Rounds of {COPIES * TERMS} evaluations")
            place = gr.Column()
        plot = gr.Plot(show_label=False, format="png")

    def likelihood(path: str | None, rounds: int, *asked: Any) -> Iterator[Any]:
        for bound in engine.likelihood(engine.read(path), _request(engine, asked), rounds):
            yield _plot(engine, bound), _said(engine, bound, rounds)

    with place:
        _runs(likelihood, [picture, rounds, *condition], plot, "Evaluate", "likelihood")


def _said(engine: Engine, bound: Bound, rounds: int) -> str:
    what = "bits/dim" if engine.value_range.num_bins else "bits/dim (a density of values in [-1, 1])"
    return (
        f"**{bound.total:.3f} ± {bound.standard_error:.3f} {what}** or fewer: the variational bound, with its standard error, "
        f"from {len(bound.rounds)} of {rounds} rounds. Each dot is one term of it, at one timestep with one noise."
    )


def _plot(engine: Engine, bound: Bound) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, (timesteps, terms) = figure.subplots(), bound.points()
    axes.semilogy(timesteps, np.maximum(terms, 1e-8), ".", markersize=5, alpha=0.5)
    axes.set(xlabel="timestep t", ylabel="term of the bound, bits/dim", xlim=(-0.02 * engine.total, 1.02 * engine.total))
    axes.grid(alpha=0.3)
    return figure
