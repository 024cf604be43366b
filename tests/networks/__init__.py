"""Random networks as small specifications, each with two interpreters.

A specification is a tree of frozen dataclasses, so that a failing one can be printed and pasted.
`canonical` writes the network plainly, with a tap at each product that has to become a layer;
`spelled` writes the same function in the way that the specification says. `roles` says of each
parameter what has to become of it: `"layer"`, `"fallback"`, `"either"`, or `"sum"`, a bias that is
added to the sum of several products of its block and joins one of them.
"""

from networks.blocks import *  # noqa: F403  so that a printed specification can be pasted
from networks.draw import draw_network as draw_network
from networks.draw import networks as networks
from networks.network import *  # noqa: F403
from networks.repeated import *  # noqa: F403
from networks.spelling import *  # noqa: F403
from networks.tokens import *  # noqa: F403
