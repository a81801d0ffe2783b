"""AdaFrame: look at one frame after another where a policy says, until more looks promise little."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pliant.core.site import Site
from pliant.estimators.gaussian import Gaussian
from pliant.execute.cursor import Classify, Cursor, Open, Place, Reader, Reading
from pliant.execute.exits import Exits, MostUseful
from pliant.execute.heads import PooledClassifier
from pliant.losses.baselines import JointCritic
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import Pooled
from pliant.scores.gates import LinearGate
from pliant.scores.lookahead import Lookahead
from pliant.scores.policy import Shrink
from pliant.systems.backbones import conv_norm, resnet
from pliant.systems.clips import Frames, Nothing, Overview


class Weigh(nn.Module):
    """Beside the logits, what further looks are expected to gain."""

    def __init__(self, utility: nn.Linear) -> None:
        super().__init__()
        self.utility = utility

    def forward(self, reading: Reading, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits first."""
        return logits, self.utility(reading.memory[0].detach()).squeeze(1)


def glancing(
    reader: Reader, num_classes: int, *, hidden: int, steps: int, std: float, patience: int, margin: float
) -> Exits:
    """AdaFrame around any reader whose memory begins with a hidden state."""
    head, utility, scorer, move = (
        Classify(hidden, num_classes),
        nn.Linear(hidden, 1),
        LinearGate(hidden, bias=0.0),
        Place(),
    )
    critic = JointCritic(scorer, utility)
    stages = [
        Open(reader, at=0.5),
        *(Cursor(Site(critic, Gaussian(std=std)), move, reader) for _ in range(steps - 1)),
    ]
    stops = [Site(Lookahead(margin), Threshold(0.5 - patience)) for _ in range(steps - 1)]
    return Exits(stages, [head] * steps, stops, answer=MostUseful(), view=Weigh(utility))


def adaframe(
    num_classes: int = 10, in_chans: int = 3, *, steps: int = 5, depth: int = 20, widths: Sequence[int] = (16, 32, 64),
    hidden: int = 128, glances: int = 16, std: float = 0.1, patience: int = 2, margin: float = 0.7,
) -> Exits:  # fmt: skip
    r"""Look at a clip's middle frame, then wherever the state says, and stop when the expected gain keeps falling.

    .. math:: h_t = \mathrm{LSTM}([f(x_{a_t}); u_t; a_t], h_{t-1}), \quad u_t = \mathrm{attend}(h_{t-1}, \mathrm{overview}(x)), \quad
        a_{t+1} \sim N(\sigma(w h_t), \text{std}^2), \quad V_t = v h_t

    Train all steps with ``sites.*`` bound to ``pliant.rules.Always``: cross-entropy, ``Reinforce`` of
    ``MarginReturns`` with ``baseline=pliant.losses.learned``, and ``ValueLoss``. Then patience and margin trade looks for accuracy: a
    row stops at the ``patience``-th look that expects ``margin`` less than the most so far (``sites.*``, threshold 0.5 less the
    patience), and answers as after the look that promised most.

    Shape:
        clips :math:`(R, T, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the frames.
        steps: looks at most; 3, 5 or 10 in the paper.
        depth: layers of the encoder :math:`f`, a ResNet without a head: 6n + 2.
        widths: of its three groups.
        hidden: units of the LSTM.
        glances: frames of the global memory, seen as thumbnails of 8 pixels; 0 for none.
        std: of the places drawn in training, in shares of the clip.
        patience: looks below the margin that a row stops at.
        margin: :math:`\mu`, in units of the expected gain.

    Returns:
        The chain.

    >>> from pliant.core.bind import sites
    >>> list(sites(adaframe(depth=8, steps=2)))
    ['stages.1.site', 'sites.0']

    References:
        Survey section 4.2.1 (3); Wu et al., AdaFrame, CVPR 2019.

    Differs from the paper: small networks, not pre-trained; the LSTM has one layer, and is told where it looks; margins below 0
    count as 0 in the reward.
    """
    frames = resnet(num_classes, in_chans, depth=depth, widths=widths)
    layers = [m for a, b in pairwise((in_chans, 16, 32)) for m in (*conv_norm(a, b, 3, 2), nn.ReLU())]
    light = nn.Sequential(Shrink(8), *layers, PooledClassifier(32, hidden // 2))
    overview = Overview(light, hidden // 2, glances, hidden=hidden) if glances else Nothing()
    reader = Frames(nn.Sequential(frames.stem, *frames.blocks, Pooled()), widths[-1], overview, hidden=hidden)
    return glancing(reader, num_classes, hidden=hidden, steps=steps, std=std, patience=patience, margin=margin)
