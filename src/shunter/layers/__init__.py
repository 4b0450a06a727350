"""Mixtures beside the layer: of linear experts, fitted by EM, and of whole models, by domain."""
