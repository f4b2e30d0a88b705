"""Features that stand in for those of images, where there are only words.

The features of texts share a large mean, which images do not: minus that, a text's feature has
what it has in common with images of it. Moving a text away from its stand-in is moving it away
from images of it. (Its own feature would not do: the cosine with that has no gradient.)
"""

import torch.nn.functional as F
from torch import Tensor


def stand_ins(texts: Tensor, retained: Tensor) -> Tensor:
    """Return the unit stand-in of each text, (texts, width).

    `texts` and `retained` are unit text features of the original model; those of the retained
    captions give the mean.
    """
    return F.normalize(texts - retained.mean(dim=0), dim=-1)
