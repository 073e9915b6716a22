"""Problems that jump, kink, or are smooth, and what `audit` is to say of each.

`confusion(seeds)` is the table of expected against found. As a program it prints the table of 50 seeds:

    python tests/audit_cases.py [seeds [n_paths]]
"""

import collections
import sys
from dataclasses import dataclass

import torch
from problems import F64, scalar

from sdesens import SDE, Problem, with_running_integral
from sdesens.audit import Audit, audit
from sdesens.functionals import AsianCall, Call, ConstantRate, Digital, Laplace, Moment

STEPS, FIXINGS = 32, 8


@dataclass(frozen=True)
class Case:
    """A problem and what is expected: `steep` and `singular` are not looked at where None."""

    problem: Problem
    kind: str
    steep: bool | None = False
    singular: bool | None = False
    wrt: tuple[str, ...] | None = None

    def right(self, found: Audit) -> bool:
        return (
            found.kind == self.kind
            and self.steep in (None, found.steep)
            and self.singular in (None, found.singular)
        )  # fmt: skip


# Equations


def gbm(functional, *, dtype=F64, drift=None, diffusion=None, steps=STEPS, **extra) -> Problem:
    """S from 100, spread about 20 at time 1."""
    params = {k: scalar(v, dtype) for k, v in {"mu": 0.05, "sigma": 0.2, **extra}.items()}
    sde = SDE(drift or (lambda t, y, p: p["mu"] * y), diffusion or (lambda t, y, p: p["sigma"] * y), params)
    return Problem(sde, functional, scalar(100.0, dtype)[None], (0.0, 1.0), steps)


def fixings(functional, *, dtype=F64, **extra) -> Problem:
    """The same, seen at FIXINGS times."""
    one = gbm(functional, dtype=dtype, **extra)
    return Problem(one.sde, functional, one.y0, torch.linspace(0, 1, FIXINGS + 1, dtype=F64), STEPS)


def brownian(functional, *, dtype=F64, **extra) -> Problem:
    """X_t = 5 t + 20 W_t."""
    params = {k: scalar(v, dtype) for k, v in {"mu": 5.0, "sigma": 20.0, **extra}.items()}
    sde = SDE(lambda t, y, p: p["mu"] + 0 * y, lambda t, y, p: p["sigma"] + 0 * y, params)
    return Problem(sde, functional, torch.zeros(1, dtype=dtype), (0.0, 1.0), STEPS)


def ou(functional, *, drift=None, diffusion=None, dtype=F64, times=2, **extra) -> Problem:
    """dX = kappa (m - X) dt + sigma dW, spread about 0.3."""
    values = {"kappa": 1.3, "m": 0.4, "sigma": 0.5, **extra}
    sde = SDE(
        drift or (lambda t, y, p: p["kappa"] * (p["m"] - y)),
        diffusion or (lambda t, y, p: p["sigma"] + 0 * y),
        {k: scalar(v, dtype) for k, v in values.items()},
    )
    return Problem(sde, functional, scalar(1.2, dtype)[None], torch.linspace(0, 2, times, dtype=F64), STEPS)


def _pair_diffusion(t, y, p):
    rho = p["rho"]
    one = torch.ones_like(rho)
    factor = torch.stack((torch.stack((one, 0 * one)), torch.stack((rho, (1 - rho**2).sqrt()))))
    return (p["sigma"] * y).unsqueeze(-1) * factor


def pair(functional, dtype=F64) -> Problem:
    """Two correlated assets."""
    params = {"mu": scalar(0.05, dtype), "sigma": torch.tensor([0.2, 0.3], dtype=dtype), "rho": scalar(0.5, dtype)}
    sde = SDE(lambda t, y, p: p["mu"] * y, _pair_diffusion, params, noise_type="general")
    return Problem(sde, functional, torch.tensor([100.0, 95.0], dtype=dtype), (0.0, 1.0), STEPS)


def triple(functional, dtype=F64) -> Problem:
    """Three coupled components, additive noise of two Brownian motions."""
    params = {
        "A": torch.tensor([[-1.0, 0.3, 0.0], [0.2, -0.8, 0.4], [0.1, 0.0, -1.2]], dtype=dtype),
        "L": torch.tensor([[0.6, 0.0], [0.2, 0.5], [-0.3, 0.4]], dtype=dtype),
    }
    sde = SDE(lambda t, y, p: y @ p["A"].mT, lambda t, y, p: p["L"], params, noise_type="additive")
    return Problem(sde, functional, torch.tensor([1.0, 0.5, -0.5], dtype=dtype), (0.0, 1.0), STEPS)


def integral(functional) -> Problem:
    """An OU process and its running integral, seen at FIXINGS times."""
    base = ou(functional)
    sde = with_running_integral(base.sde, lambda t, x, p: x[:, 0])
    return Problem(
        sde, functional, torch.tensor([1.2, 0.0], dtype=F64), torch.linspace(0, 2, FIXINGS + 1, dtype=F64), STEPS
    )


# What is measured


def X(ys):
    return ys[-1, :, 0]


def above(x, level=0.0):
    return (x > level).to(x.dtype)


def straight_through(x):
    """Looks differentiable, and is a staircase."""
    return x + (torch.round(x) - x).detach()


def first_passage(ys, p):
    """The first time seen above 115, in units of a fixing; FIXINGS + 1 if never."""
    hit = (ys[:, :, 0] > 115).to(ys.dtype)
    never = torch.ones_like(hit[:1])
    return torch.cat((hit, never)).argmax(0).to(ys.dtype)


def picked(ys, p):
    """The component of the largest, by another weight: jumps from one to the other."""
    best = ys[-1].argmax(-1, keepdim=True)
    return torch.gather(ys[-1] * torch.tensor([1.0, 2.0], dtype=ys.dtype), -1, best)[:, 0]


def second_order_start(ys, p):
    """The middle one of three numbers, weighted by its place."""
    order = ys[-1].sort(-1).indices.to(ys.dtype)
    return (order * torch.tensor([1.0, 3.0, 9.0], dtype=ys.dtype)).sum(-1)


def huber(x):
    return torch.where(x.abs() < 10, x**2 / 2, 10 * x.abs() - 50)


JUMPS = {
    "digital": gbm(Digital(100.0)),
    "digital deep out": gbm(Digital(150.0)),
    "digital, discounted": gbm(Digital(100.0, discount=ConstantRate("r")), r=0.03),
    "digital, strike": gbm(Digital("strike"), strike=105.0),
    "comparison": gbm(lambda ys, p: above(X(ys), 110.0)),
    "round": gbm(lambda ys, p: torch.round(X(ys) / 10)),
    "floor": brownian(lambda ys, p: torch.floor(X(ys) / 7)),
    "sign": brownian(lambda ys, p: torch.sign(X(ys) - 3)),
    "to int": gbm(lambda ys, p: (X(ys) / 10).to(torch.int64).to(ys.dtype)),
    "heaviside": ou(lambda ys, p: torch.heaviside(X(ys) - 0.5, torch.zeros_like(X(ys)))),
    "where": gbm(lambda ys, p: torch.where(X(ys) > 90, X(ys), 0.9 * X(ys))),
    "indicator times smooth": gbm(lambda ys, p: X(ys) * above(X(ys), 105.0)),
    "straight through": gbm(lambda ys, p: straight_through(X(ys) / 10)),
    "mod": brownian(lambda ys, p: torch.remainder(X(ys), 15.0)),
    "gap call": gbm(lambda ys, p: (X(ys) - 90) * above(X(ys), 100.0)),
    "up-and-out call": fixings(lambda ys, p: (X(ys) - 100).relu() * above(125 - ys[:, :, 0].amax(0))),
    "down-and-in put": fixings(lambda ys, p: (100 - X(ys)).relu() * above(85 - ys[:, :, 0].amin(0))),
    "first passage": fixings(first_passage),
    "passage before the end": fixings(lambda ys, p: above(ys[:, :, 0].amax(0), 115.0)),
    "occupation time": fixings(lambda ys, p: above(ys[1:, :, 0], 102.0).mean(0)),
    "Asian digital": fixings(lambda ys, p: above(ys[1:, :, 0].mean(0), 101.0)),
    "corridor and strike": fixings(lambda ys, p: above(ys[1:, :, 0], p["level"]).mean(0), level=98.0),
    "integral above": integral(lambda ys, p: above(ys[-1, :, 1], 1.4)),
    "argmax and gather": pair(picked),
    "which is larger": pair(lambda ys, p: above(ys[-1, :, 0] - ys[-1, :, 1])),
    "order of three": triple(second_order_start),
    "norm above": triple(lambda ys, p: above(ys[-1].norm(dim=-1), 0.7)),
    "digital, float32": gbm(Digital(100.0), dtype=torch.float32),
    "barrier, float32": fixings(lambda ys, p: (X(ys) - 100).relu() * above(125 - ys[:, :, 0].amax(0)), dtype=torch.float32),
    "round, float32": brownian(lambda ys, p: torch.round(X(ys) / 5), dtype=torch.float32),
    "call and half a jump": gbm(lambda ys, p: (X(ys) - 100).relu() + 0.5 * above(X(ys), 100.0)),
    "call and a small jump": gbm(lambda ys, p: (X(ys) - 100).relu() + 0.01 * above(X(ys), 110.0)),
    "square and a small jump": brownian(lambda ys, p: (X(ys) / 20) ** 2 + 0.05 * above(X(ys), 8.0)),
    "small jump, float32": gbm(lambda ys, p: (X(ys) - 100).relu() + 0.5 * above(X(ys), 112.0), dtype=torch.float32),
    "basket call and a small jump": pair(lambda ys, p: (ys[-1].mean(-1) - 100).relu() + 0.05 * above(ys[-1, :, 0], 105.0)),
    "drift that jumps": ou(lambda ys, p: X(ys), drift=lambda t, y, p: p["kappa"] * (1 - 1.5 * above(y, p["m"]))),
    "regime of the volatility": ou(lambda ys, p: X(ys) ** 2, diffusion=lambda t, y, p: p["sigma"] * (0.5 + 0.5 * above(y, 0.8))),
    "rounded state in the drift": ou(lambda ys, p: X(ys), drift=lambda t, y, p: p["kappa"] * (p["m"] - torch.round(4 * y) / 4)),
    "drift rounded finely": ou(lambda ys, p: X(ys), drift=lambda t, y, p: p["kappa"] * (p["m"] - torch.round(200 * y) / 200)),
    "rounded at every date": ou(lambda ys, p: (torch.round(ys[:, :, 0] / 0.02) * 0.02 + ys[:, :, 0]).mean(0)),
    "tail of a Laplace": ou(lambda ys, p: Laplace(1.0)(ys, p) * above(X(ys), 0.2)),
}  # fmt: skip

KINKS = {
    "call": gbm(Call(100.0)),
    "call deep out": gbm(Call(150.0)),
    "call, strike": gbm(Call("strike", discount=ConstantRate("r")), strike=105.0, r=0.03),
    "put": gbm(lambda ys, p: (100 - X(ys)).relu()),
    "abs": brownian(lambda ys, p: X(ys).abs()),
    "straddle": ou(lambda ys, p: (X(ys) - 0.5).abs()),
    "relu of a difference": pair(lambda ys, p: (ys[-1, :, 0] - ys[-1, :, 1]).relu()),
    "best of two": pair(lambda ys, p: ys[-1].amax(-1)),
    "basket call": pair(lambda ys, p: (ys[-1].mean(-1) - 100).relu()),
    "clamp": brownian(lambda ys, p: X(ys).clamp(-10, 20)),
    "leaky relu": brownian(lambda ys, p: torch.nn.functional.leaky_relu(X(ys), 0.1)),
    "Asian call": fixings(AsianCall(100.0)),
    "lookback": fixings(lambda ys, p: ys[:, :, 0].amax(0)),
    "lookback call": fixings(lambda ys, p: (ys[:, :, 0].amax(0) - 110).relu()),
    "range": ou(lambda ys, p: ys[:, :, 0].amax(0) - ys[:, :, 0].amin(0), times=9),
    "sum of calls over time": fixings(lambda ys, p: (ys[1:, :, 0] - 100).relu().mean(0)),
    "integral call": integral(lambda ys, p: (ys[-1, :, 1] - 1.4).relu()),
    "1-norm": triple(lambda ys, p: ys[-1].abs().sum(-1)),
    "max of three": triple(lambda ys, p: ys[-1].amax(-1)),
    "median of three": triple(lambda ys, p: ys[-1].median(-1).values),
    "call, float32": gbm(Call(100.0), dtype=torch.float32),
    "best of two, float32": pair(lambda ys, p: ys[-1].amax(-1), torch.float32),
    "softened digital and a call": gbm(lambda ys, p: torch.sigmoid(50 * (X(ys) - 100)) + (X(ys) - 110).relu()),
    "small kink on a curve": brownian(lambda ys, p: torch.exp(X(ys) / 40) + 0.01 * (X(ys) - 5).abs()),
    "drift with relu": ou(lambda ys, p: X(ys), drift=lambda t, y, p: p["kappa"] * (p["m"] - y).relu()),
    "volatility with relu": ou(lambda ys, p: X(ys) ** 2, diffusion=lambda t, y, p: p["sigma"] * (1 + (y - 0.5).relu())),
}  # fmt: skip

SMOOTH = {
    "state": gbm(Moment(1)),
    "square": gbm(Moment(2)),
    "cube": ou(Moment(3)),
    "exp": gbm(lambda ys, p: torch.exp(-X(ys) / 100)),
    "Laplace": ou(Laplace(2.0)),
    "sin": brownian(lambda ys, p: torch.sin(X(ys) / 10)),
    "sigmoid": brownian(lambda ys, p: torch.sigmoid(X(ys) / 10)),
    "tanh": ou(lambda ys, p: torch.tanh(X(ys))),
    "log": gbm(lambda ys, p: torch.log(X(ys))),
    "logsumexp": triple(lambda ys, p: torch.logsumexp(ys[-1], -1)),
    "softmax": triple(lambda ys, p: torch.softmax(ys[-1], -1)[:, 0]),
    "norm away from 0": pair(lambda ys, p: ys[-1].norm(dim=-1)),
    "product": pair(lambda ys, p: ys[-1].prod(-1) / 100),
    "softplus": brownian(lambda ys, p: torch.nn.functional.softplus(X(ys) / 5)),
    "Asian": fixings(lambda ys, p: ys[1:, :, 0].mean(0)),
    "geometric Asian": fixings(lambda ys, p: ys[1:, :, 0].log().mean(0).exp()),
    "realised variance": fixings(lambda ys, p: ys[:, :, 0].log().diff(dim=0).square().sum(0)),
    "discounted by its integral": integral(lambda ys, p: torch.exp(-ys[-1, :, 1])),
    "parameters alone": gbm(lambda ys, p: p["mu"] * p["sigma"] + 0 * X(ys)),
    "strike, squared": gbm(lambda ys, p: (X(ys) - p["strike"]) ** 2, strike=105.0),
    "exp of the state": ou(lambda ys, p: torch.exp(3 * X(ys))),
    "rational": ou(lambda ys, p: 1 / (1 + X(ys) ** 2)),
    "a kink far away": gbm(lambda ys, p: (X(ys) - 100_000).relu() + X(ys)),
    "nonlinear drift": ou(lambda ys, p: X(ys), drift=lambda t, y, p: p["kappa"] * torch.sin(y) - y**3),
    "exp, float32": gbm(lambda ys, p: torch.exp(-X(ys) / 100), dtype=torch.float32),
    "square, float32": gbm(Moment(2), dtype=torch.float32),
    "sin, float32": brownian(lambda ys, p: torch.sin(X(ys) / 10), dtype=torch.float32),
    "rounded to float32 inside": gbm(lambda ys, p: (X(ys).float().to(F64) / 100) ** 2),
    "Huber": brownian(lambda ys, p: huber(X(ys))),
    "relu squared": brownian(lambda ys, p: (X(ys) / 20).relu() ** 2),
}

STEEP = {
    "sigmoid 10": gbm(lambda ys, p: torch.sigmoid(10 * (X(ys) - 100))),
    "sigmoid 50": gbm(lambda ys, p: torch.sigmoid(50 * (X(ys) - 100))),
    "sigmoid 200": gbm(lambda ys, p: torch.sigmoid(200 * (X(ys) - 100))),
    "sigmoid 500": brownian(lambda ys, p: torch.sigmoid(500 * X(ys))),
    "tanh 20": brownian(lambda ys, p: torch.tanh(20 * (X(ys) - 5))),
    "sigmoid 50, float32": gbm(lambda ys, p: torch.sigmoid(50 * (X(ys) - 100)), dtype=torch.float32),
}

SINGULAR = {
    "root": gbm(lambda ys, p: (X(ys) - 100).abs().sqrt()),
    "root of a relu": brownian(lambda ys, p: (X(ys).relu() + 1e-300).sqrt()),
    "root of a spread": pair(lambda ys, p: (ys[-1, :, 0] - ys[-1, :, 1]).abs().sqrt()),
}

# the same seen through one parameter, that moves the path less
NARROW = {
    "digital, mu": Case(gbm(Digital(100.0)), "jump", wrt=("mu",)),
    "digital, sigma": Case(gbm(Digital(100.0)), "jump", wrt=("sigma",)),
    "digital, y0": Case(gbm(Digital(100.0)), "jump", wrt=("y0",)),
    "digital, t1": Case(gbm(Digital(100.0)), "jump", wrt=("t1",)),
    "digital, all": Case(gbm(Digital(100.0)), "jump", wrt=("mu", "sigma", "y0", "t1")),
    "digital, strike only": Case(gbm(Digital("strike"), strike=105.0), "jump", wrt=("strike",)),
    "call, t1": Case(gbm(Call(100.0)), "kink", wrt=("t1",)),
    "call, strike only": Case(gbm(Call("strike"), strike=105.0), "kink", wrt=("strike",)),
    "square, y0": Case(gbm(Moment(2)), "smooth", wrt=("y0",)),
    "sigmoid 200, mu": Case(gbm(lambda ys, p: torch.sigmoid(200 * (X(ys) - 100))), "smooth", steep=None, wrt=("mu",)),
    "exp, t1": Case(gbm(lambda ys, p: torch.exp(-X(ys) / 100)), "smooth", wrt=("t1",)),
}

CASES = {
    **{f"jump: {name}": Case(q, "jump", steep=None) for name, q in JUMPS.items()},
    **{
        f"kink: {name}": Case(q, "kink", steep=None if name.startswith("softened") else False)
        for name, q in KINKS.items()
    },
    **{f"smooth: {name}": Case(q, "smooth") for name, q in SMOOTH.items()},
    **{f"steep: {name}": Case(q, "smooth", steep=True) for name, q in STEEP.items()},
    **{f"singular: {name}": Case(q, "kink", steep=None, singular=True) for name, q in SINGULAR.items()},
    **{f"narrow: {name}": case for name, case in NARROW.items()},
}


def confusion(seeds, names=tuple(CASES), *, n_paths: int = 20_000):
    """How often each kind is found where each is expected, and the cases that were not right."""
    table, wrong = collections.Counter(), collections.Counter()
    for name in names:
        case = CASES[name]
        for seed in seeds:
            found = audit(case.problem, wrt=case.wrt, seed=seed, n_paths=n_paths)
            table[case.kind, found.kind] += 1
            if not case.right(found):
                wrong[name, found.kind, found.steep, found.singular] += 1
    return table, wrong


if __name__ == "__main__":
    seeds, n_paths = (int(given) for given in (*sys.argv[1:], *("50", "20000")[len(sys.argv) - 1 :]))
    table, wrong = confusion(range(seeds), n_paths=n_paths)
    for (expected, found), count in sorted(table.items()):
        print(f"expected {expected:8} found {found:8} {count:6}")
    for what, count in sorted(wrong.items()):
        print("not right:", *what, count)
