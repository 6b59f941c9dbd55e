"""Python imports this when it starts, if this folder is on its path: ranks that a rehearsed notebook starts see T4s."""

import os

if "LOCAL_RANK" in os.environ:
    from as_t4 import disguise

    disguise([int(os.environ["LOCAL_RANK"])])
