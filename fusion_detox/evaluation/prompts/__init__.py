"""Prompt sets, as RealToxicityPrompts, ToxiGen, BOLD, HateCheck and XSTest publish them."""
