"""From a compressed model to hardware: integer specification, RTL, simulation, synthesis, report."""
