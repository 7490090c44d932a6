"""Figures of a run: data frames in, plotly figures out. Every score is better the higher it is.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; each kind of system has its own marker as well.
Backgrounds are transparent, so a figure suits a light and a dark page.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emorl.evaluation.pareto import front
from emorl.runs.results import BEST, Kind

ORANGE, BLUE, GREEN, VERMILION, PURPLE, GREY = "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#8A8A8A"
MARKERS = {
    Kind.FRONT: ("circle", GREEN, "front, re-scored"),
    Kind.BASE: ("x", GREY, "base"),
    Kind.POLICY: ("square", ORANGE, "policies alone"),
    Kind.PARAMETER_AVERAGE: ("triangle-up", PURPLE, "parameter average"),
    Kind.ENSEMBLE: ("star", VERMILION, "ensembles"),
    Kind.DYNAMIC: ("diamond", BLUE, "dynamic ensemble"),
    Kind.DISTILLED: ("hexagon", BLUE, "distilled adapter"),
}
"""of each kind of system: symbol, colour, name in the legend"""
_LABEL_POSITIONS = {  # kind or system: neighbours write in different directions
    Kind.FRONT: "top right",
    Kind.BASE: "bottom center",
    Kind.POLICY: "top center",
    Kind.PARAMETER_AVERAGE: "bottom center",
    Kind.ENSEMBLE: "middle left",
    Kind.DYNAMIC: "bottom right",
    Kind.DISTILLED: "middle right",
    BEST: "top right",
}
_VALUES = "Viridis"
_GRID = "rgba(128,128,128,0.25)"
_FONT = "system-ui, sans-serif"


def front_figure(trials: pd.DataFrame, summary: pd.DataFrame, x: str, y: str) -> go.Figure:
    """Two objectives: the search's trials and their front, and the compared systems with error bars.

    Args:
        trials: the search's `trials.csv`; scores on the validation prompts.
        summary: the evaluation's `summary.csv`; scores on the test prompts.
    """
    figure = go.Figure([_trial_points(trials, x, y), _trial_front(trials, x, y)])
    for kind, (symbol, colour, name) in MARKERS.items():
        systems = summary[summary["kind"] == kind]
        if systems.empty:
            continue
        figure.add_scatter(
            x=systems[x],
            y=systems[y],
            error_x={"array": systems[f"{x}_error"], "thickness": 1, "width": 3},
            error_y={"array": systems[f"{y}_error"], "thickness": 1, "width": 3},
            mode="markers+text",
            text=[short_name(system, kind) for system in systems["system"]],
            textposition=[_LABEL_POSITIONS.get(system, _LABEL_POSITIONS[kind]) for system in systems["system"]],
            marker={"symbol": symbol, "color": colour, "size": 8 if kind == "front" else 12, "line": {"width": 1}},
            cliponaxis=False,
            customdata=systems["system"],
            hovertemplate=f"%{{customdata}}<br>{x} %{{x:.3f}}<br>{y} %{{y:.3f}}<extra>test prompts</extra>",
            name=name,
        )
    figure.update_xaxes(title=f"{x} (higher is better)")
    figure.update_yaxes(title=f"{y} (higher is better)")
    return _styled(figure, f"Trade-off of {y} against {x}", height=520)


def parallel_figure(trials: pd.DataFrame, objectives: Sequence[str]) -> go.Figure:
    """Many objectives: a line for each of the search's trials across an axis for each score, those of the front in colour."""
    best = trials["front"].astype(bool)
    scores = {name: trials[f"score_{name}"].round(4) for name in objectives}
    lines = go.Parcoords(
        line={"color": best.astype(int), "colorscale": [[0, _GRID], [1, BLUE]], "cmin": 0, "cmax": 1, "showscale": False},
        dimensions=[{"label": name, "values": values} for name, values in scores.items()],
        labelangle=-30,
        name="search trials (validation)",
    )
    title = f"The scores of {len(trials)} trials, the front's {best.sum()} in blue (validation; higher is better)"
    return _styled(go.Figure(lines), title, height=520).update_layout(margin={"t": 130})


def short_name(system: str, kind: str) -> str:
    """Short, so that neighbours stay legible: `policy short` -> `short`, `ensemble, best found` -> `best found`."""
    names: dict[str, str] = {Kind.POLICY: system.removeprefix("policy "), Kind.ENSEMBLE: system.removeprefix("ensemble, ")}
    names |= {Kind.FRONT: system.removeprefix("front "), Kind.PARAMETER_AVERAGE: "average"}
    names |= {Kind.DISTILLED: system.removeprefix("distilled, front ")}
    return names.get(kind, system)


def _trial_points(trials: pd.DataFrame, x: str, y: str) -> go.Scatter:
    return go.Scatter(
        x=trials[f"score_{x}"],
        y=trials[f"score_{y}"],
        mode="markers",
        opacity=0.55,
        marker={
            "color": trials["value"],
            "colorscale": _VALUES,
            "size": 7,
            "colorbar": _colour_bar("value"),
            "line": {"width": 0.7, "color": GREY},
        },
        text=_weight_texts(trials),
        hovertemplate=f"trial<br>{x} %{{x:.3f}}<br>{y} %{{y:.3f}}<br>%{{text}}<extra>validation prompts</extra>",
        name="search trials (validation)",
    )


def _trial_front(trials: pd.DataFrame, x: str, y: str) -> go.Scatter:
    """The staircase under which every point is dominated in these two objectives."""
    columns = [f"score_{x}", f"score_{y}"]
    best = trials[front(trials[columns])].sort_values(columns[0])
    return go.Scatter(
        x=best[columns[0]],
        y=best[columns[1]],
        mode="lines+markers",
        line={"shape": "vh", "color": BLUE, "width": 1.5, "dash": "dot"},
        marker={"symbol": "circle-open", "size": 9},
        hoverinfo="skip",
        name="their front (validation)",
    )


def ternary_figure(trials: pd.DataFrame, policies: Sequence[str], column: str, title: str) -> go.Figure:
    """One score over the weights of exactly three policies; each corner is a policy alone, brightest is best."""
    if len(policies) != 3:
        raise ValueError(f"a ternary map needs three policies, got {len(policies)}: {', '.join(policies)}")
    best = trials.loc[[trials[column].idxmax()]]
    a, b, c = (f"weight_{name}" for name in policies)
    points = go.Scatterternary(
        a=trials[a],
        b=trials[b],
        c=trials[c],
        mode="markers",
        marker={
            "color": trials[column],
            "colorscale": _VALUES,
            "size": 13,
            "colorbar": _colour_bar(""),
            "line": {"width": 0.5, "color": GREY},
        },
        text=[f"{score:.3f}<br>{weights}" for score, weights in zip(trials[column], _weight_texts(trials), strict=True)],
        hoverinfo="text",
        cliponaxis=False,
        name=column,
    )
    ring = {"symbol": "circle-open", "size": 20, "color": VERMILION, "line": {"width": 3}}
    mark = go.Scatterternary(
        a=best[a], b=best[b], c=best[c], mode="markers", marker=ring, cliponaxis=False, hoverinfo="skip", name="best"
    )
    figure = go.Figure([points, mark])
    axes = {
        f"{key}axis": {"title": {"text": name}, "gridcolor": _GRID, "linecolor": GREY, "nticks": 5, "showticklabels": False}
        for key, name in zip("abc", policies, strict=True)
    }
    figure.update_layout(ternary={"sum": 1, "bgcolor": "rgba(0,0,0,0)", **axes}, showlegend=False)
    return _styled(figure, title, height=400).update_layout(margin={"t": 76})


def search_trace(trials: pd.DataFrame) -> go.Figure:
    """The value of each trial in the order they ran, and the best so far (both on the validation prompts)."""
    figure = go.Figure()
    figure.add_scatter(
        x=trials["trial"] + 1,
        y=trials["value"],
        mode="markers",
        marker={"color": BLUE, "size": 6},
        text=_weight_texts(trials),
        hovertemplate="trial %{x}: %{y:.3f}<br>%{text}<extra></extra>",
        name="trial",
    )
    best = trials["value"].cummax()
    figure.add_scatter(
        x=trials["trial"] + 1, y=best, mode="lines", line={"shape": "hv", "color": VERMILION}, name="best so far"
    )
    figure.update_xaxes(title="trial")
    figure.update_yaxes(title="value (higher is better)")
    return _styled(figure, f"The search's best value after {len(trials)} trials: {best.iloc[-1]:.3f}")


def training_figure(validations: pd.DataFrame, policy: str, kept_step: int, collapse_share: float) -> go.Figure:
    """One policy's validation reward over its own distinct share, and the checkpoint that was kept.

    Args:
        validations: columns step, reward, distinct_share; step 0 is the base.
        collapse_share: share of the base's distinct completions under which a policy counts as collapsed.
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.08)
    for row, column, colour, name in ((1, "reward", BLUE, "reward"), (2, "distinct_share", GREEN, "distinct share")):
        figure.add_scatter(
            x=validations["step"],
            y=validations[column],
            mode="lines+markers",
            line={"color": colour},
            hovertemplate=f"step %{{x}}: {name} %{{y:.3f}}<extra></extra>",
            name=name,
            row=row,
            col=1,
        )
        figure.update_yaxes(title=name, row=row, col=1)
    threshold = collapse_share * validations["distinct_share"].iloc[0]
    figure.add_hline(y=threshold, line={"dash": "dot", "color": VERMILION, "width": 1.5}, row=2, col=1)
    figure.add_vline(x=kept_step, line={"dash": "dash", "color": GREY, "width": 1})
    figure.update_yaxes(range=[0, 1.05], row=2, col=1)
    figure.update_xaxes(title="step", row=2, col=1)
    figure.update_layout(showlegend=False)
    return _styled(figure, f"Policy {policy}: validation while training", height=380)


def hypervolume_figure(volumes: Mapping[str, float]) -> go.Figure:
    """One bar per group of systems."""
    groups = list(volumes)[::-1]
    figure = go.Figure(
        go.Bar(
            x=[volumes[group] for group in groups],
            y=groups,
            orientation="h",
            marker={"color": [GREEN if group == "ensemble" else GREY for group in groups]},
            text=[f"{volumes[group]:.4g}" for group in groups],
            hoverinfo="skip",
        )
    )
    figure.update_xaxes(title="hypervolume (higher is better)", rangemode="tozero")
    figure.update_yaxes(automargin=True)
    return _styled(figure, "How much each method offers", height=90 + 50 * len(groups))


def _weight_texts(trials: pd.DataFrame) -> list[str]:
    columns = [name for name in trials.columns if name.startswith("weight_")]
    return [
        "<br>".join(f"{name.removeprefix('weight_')} {row[name]:.2f}" for name in columns)
        for row in trials[columns].to_dict("records")
    ]


def _colour_bar(title: str) -> dict[str, object]:
    return {"title": {"text": title}, "thickness": 10, "outlinewidth": 0, "len": 0.8, "nticks": 5}


def _styled(figure: go.Figure, title: str, height: int = 400) -> go.Figure:
    """The figure with what all of ours share."""
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}, "pad": {"l": 4}},
        font={"family": _FONT, "size": 12, "color": "#444"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 60, "r": 20, "t": 48, "b": 60},
        legend={"orientation": "h", "y": -0.18, "yanchor": "top", "x": 0},
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, linecolor=GREY)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, linecolor=GREY)
    return figure
