"""A classifier that learns from its context: prompts with known outcomes in, chances of other prompts out."""

import torch
from torch import Tensor, nn

QUERIES, QUERY_WIDTH, QUERY_HEADS = 168, 6, 3
FEATURES = QUERIES * QUERY_WIDTH
"""Numbers a prompt is described by."""


class QueryAdapter(nn.Module):
    """Hidden vectors of a prompt's tokens to a fixed number of features, by queries that know the prompt.

        q = Q_0 + W_2 · dropout(GELU(LN(W_1 h_last)))          168 queries of width 6
        features = attention(LN(q), LN(W h), W h), flattened

    W_2 starts at 0: at first the queries are the same for all prompts. The shapes are those of the released code of
    arXiv:2602.03584.
    """

    def __init__(self, hidden_size: int, *, bottleneck: int = 128, dropout: float = 0.2) -> None:
        """Adapt hidden vectors of the given width."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, QUERIES, QUERY_WIDTH) * QUERY_WIDTH**-0.5)
        self.residual = nn.Sequential(
            nn.Linear(hidden_size, bottleneck),
            nn.LayerNorm(bottleneck),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(bottleneck, FEATURES),
        )
        last = self.residual[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.narrow = nn.Linear(hidden_size, QUERY_WIDTH)
        self.query_norm = nn.LayerNorm(QUERY_WIDTH)
        self.key_norm = nn.LayerNorm(QUERY_WIDTH)
        self.attention = nn.MultiheadAttention(QUERY_WIDTH, QUERY_HEADS, batch_first=True)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Features [n, 1008] of hidden vectors [n, L, H]; row i has `lengths[i]` tokens, padding after them."""
        rows = torch.arange(len(hidden), device=hidden.device)
        change = self.residual(hidden[rows, lengths - 1])
        queries = self.queries + change.unflatten(1, (QUERIES, QUERY_WIDTH))
        narrow = self.narrow(hidden)
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
        found, _ = self.attention(
            self.query_norm(queries),
            self.key_norm(narrow),
            narrow,
            key_padding_mask=padding,
            need_weights=False,
        )
        return found.flatten(1)


class ContextClassifier(nn.Module):
    """Logits of failure and success of prompts, from prompts whose outcomes are given: no gradient step at use.

    A small transformer over the set of both: each looks at the known ones only, order means nothing. Stands in for the
    tabular foundation model of arXiv:2602.03584. Starts at the mean outcome of the known.
    """

    def __init__(
        self, features: int = FEATURES, *, width: int = 64, layers: int = 2, heads: int = 4
    ) -> None:
        """A classifier of rows of `features` numbers."""
        super().__init__()
        self.read = nn.Linear(features, width)
        self.outcome = nn.Linear(1, width)
        self.layers = nn.ModuleList(_SetLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.answer = nn.Linear(width, 1)
        nn.init.zeros_(self.answer.weight)
        nn.init.zeros_(self.answer.bias)

    def forward(self, known: Tensor, outcomes: Tensor, asked: Tensor) -> Tensor:
        """Logits [M, 2].

        Args:
            known: features [N, F] of prompts with outcomes; all features are put in units of their spread.
            outcomes: [N], in [0, 1].
            asked: features [M, F] of the others.
        """
        mean, std = known.mean(0), known.std(0, correction=0).clamp(min=1e-4)
        context = self.read((known - mean) / std) + self.outcome(outcomes[:, None] - 0.5)
        query = self.read((asked - mean) / std)
        for layer in self.layers:
            context, query = layer(context, context), layer(query, context)
        level = (outcomes.sum() + 1) / (len(outcomes) + 2)
        margin = self.answer(self.norm(query)).squeeze(1) + torch.logit(level)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


class PromptClassifier(nn.Module):
    """Adapter and classifier: what is trained of V_0."""

    def __init__(self, hidden_size: int) -> None:
        """Over hidden vectors of the given width."""
        super().__init__()
        self.adapter = QueryAdapter(hidden_size)
        self.classifier = ContextClassifier()

    def forward(
        self,
        known: list[tuple[Tensor, Tensor]],
        outcomes: Tensor,
        asked: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Logits [M, 2].

        Args:
            known: (hidden vectors, lengths) of the prompts with outcomes, in any number of parts.
            outcomes: of all of them.
            asked: the same of the others.
        """
        features = [self.adapter(hidden, lengths) for hidden, lengths in known + asked]
        together = torch.cat(features)
        return self.classifier(together[: len(outcomes)], outcomes, together[len(outcomes) :])


class _SetLayer(nn.Module):
    """What a row learns from the rows of a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        keys = self.norm(context)[None]
        found, _ = self.attention(self.norm(rows)[None], keys, keys, need_weights=False)
        rows = rows + found[0]
        return rows + self.think(rows)
