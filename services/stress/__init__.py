"""Stress: a private mesh, many readers, seeded faults, and a verdict over the recorded history.

    plan, schedule, workload, history, verdict, paths   pure: what will be done, and what it means
    expected                                            the same answers by mlx-lm, undisturbed
    wires, injector, readers, watch, session            real processes, proxies, clients
    charts, report, live                                what people see

Faults exist in this tool's own process only: the mesh it starts is told the addresses of proxies
that live here, and its processes are signalled from here. No service has a way to be asked for one.
"""
