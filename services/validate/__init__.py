"""The validator: a mesh against one process, token by token, with the component to blame.

``cases`` says what is asked, ``mesh_side`` asks a mesh, ``reference_side`` asks a child process
that runs mlx-lm itself, ``session`` plays the cases through both, ``report`` tells what came of it.
The verdict is ``coordinator.validation``'s.
"""
