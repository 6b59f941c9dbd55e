"""The errors that led to an error.

raise A              record a block: A, the cause
finally: raise B     end the recording: B, that it could not be ended      B.__context__ is A
except B             whose caller may be mending something: outer          A.__context__ is outer
"""

import traceback


def cleared_chain(error: BaseException, outer: BaseException | None = None) -> list[BaseException]:
    """This error and those that were on their way when it was raised, the first one last; what their frames held is
    let go.

    Args:
        error: just caught.
        outer: what was being handled before, `sys.exception()`: with this the chain ends.
    """
    chain = [error]
    while (before := chain[-1].__context__) is not None and before is not outer:
        chain.append(before)
    for each in chain:
        traceback.clear_frames(each.__traceback__)
    return chain
