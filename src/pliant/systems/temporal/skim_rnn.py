"""Skim-RNN: at every word a large cell reads or a small one skims."""

from __future__ import annotations

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.estimators import SoftBinaryConcrete
from pliant.execute.cells import LSTMStep, SmallLSTM
from pliant.execute.steps import Hold, Partial, Recurrent
from pliant.rules.threshold import Threshold
from pliant.scores.steps import StepGate


class Reader(nn.Module):
    """Words to vectors, a recurrent network over those that are there, a linear layer on its last output.

    Shape:
        words :math:`(R, T)`, integers, 0 where a text has ended; logits :math:`(R, C)`.

    Args:
        words: the embedding.
        loop: the recurrent network.
        head: from its output to logits.

    >>> import torch
    >>> skim_rnn(3, 50, embedding=4, hidden=4, small=1)(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 3])
    """

    def __init__(self, words: nn.Module, loop: Recurrent, head: nn.Module) -> None:
        super().__init__()
        self.words = words
        self.loop = loop
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the texts ``x``; padding leaves a text's state as it was."""
        return self.head(self.loop(self.words(x), x != 0))


def skim_rnn(
    num_classes: int = 2,
    words: int = 20_000,
    *,
    embedding: int = 100,
    hidden: int = 100,
    small: int = 5,
    dropout: float = 0.0,
) -> nn.Module:
    r"""An LSTM text classifier that decides at every word, from it and the state so far, between reading and skimming.

    .. math:: p_t = \mathrm{softmax}(W [x_t; h_{t-1}] + b), \qquad
              h_t = \begin{cases} f(x_t, h_{t-1}) & \text{read} \\ [f'(x_t, h_{t-1}); h_{t-1, d'+1:d}] & \text{skim} \end{cases}

    The small cell sees the whole state and writes only its first :math:`d'` dimensions; :math:`d' = 0` is skipping. Training
    mixes both results by a relaxed sample: anneal ``*.temperature`` by ``Decay(1e-4, least=0.5)``, and add
    :class:`pliant.losses.Saving`, the mean of :math:`-\log p_t(\text{skim})`, with weight 0.01 to 0.02. In evaluation the
    threshold on the logit (0: the likelier one) moves between speed and accuracy.

    Shape:
        words :math:`(R, T)`, integers, 0 where a text has ended; logits :math:`(R, \text{num\_classes})`.

    Args:
        num_classes: classes.
        words: size of the vocabulary.
        embedding: width of the word vectors.
        hidden: :math:`d`.
        small: :math:`d'`.
        dropout: on the word vectors and the last state while training.

    Returns:
        The network; its site is visited once a word.

    Raises:
        PliantError: where ``small`` isn't within 0 and ``hidden``.

    >>> import torch
    >>> skim_rnn(3, 50, embedding=4, hidden=4, small=0)(torch.ones(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 3])

    References:
        Survey section 4.1.1 (2), Eq. 13; Seo et al., Neural Speed Reading via Skim-RNN, ICLR 2018.

    Differs from the paper: one direction; word vectors start at random, a tenth as long as PyTorch's, and aren't pre-trained.
    """
    if not 0 <= small <= hidden:
        raise PliantError(got=f"small={small}", expected=f"within 0 and hidden={hidden}", do="pass e.g. small=5")
    site = Site(StepGate(embedding, hidden), SoftBinaryConcrete(Threshold(0.0)))
    cell = LSTMStep(embedding, hidden)
    loop = Partial(cell, SmallLSTM(embedding, hidden, small=small), site) if small else Hold(cell, site)
    table = nn.Embedding(words, embedding, padding_idx=0)
    table.weight.detach().mul_(0.1)  # words seen once or twice shall not shout
    vectors = nn.Sequential(table, nn.Dropout(dropout))
    return Reader(vectors, loop, nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, num_classes)))
