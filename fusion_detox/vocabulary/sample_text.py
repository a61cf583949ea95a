"""English to estimate a vocabulary map's coverage on."""

from __future__ import annotations

ENGLISH = """\
The committee met again on Tuesday evening to decide what to do about the old bridge. Nobody \
could remember who had built it, but everyone agreed that it wasn't safe any more: two of the \
wooden beams had cracked during the winter, and the railing on the north side was missing \
altogether.
"We've been talking about this since 2009," said Margaret, who runs the little bakery next to \
the post office. "Either we raise the money ourselves, or we close it. I don't see a third way."
Her neighbour laughed. He'd heard that before. "Give it another year and there won't be anything \
left to close!" Still, he put down $50 and promised to bring his tools on Saturday (if it didn't \
rain).
In mathematics and computer science, a graph is a set of objects in which some pairs are \
related. The objects are called vertices, and each pair is an edge; a typical drawing shows dots \
joined by lines. Graphs are one of the principal subjects of study in discrete mathematics, and \
they are used to model road networks, social relations, chemical molecules, and the flow of a \
computer program.

Edit: thanks for all the replies, I really didn't expect this to blow up. To answer the most \
common question: yes, I called the landlord, no, he hasn't answered, and my sister thinks I \
should just move out. So what would you guys do? Is it worth going to court over 3 months of \
rent? lol
- Add the flour, the salt and about 1/2 cup of warm water.
- Stir until smooth, then cover and let it rest for 20-30 minutes.
- Bake at 375 degrees until golden brown, and serve with butter.
Shares of the company fell by 4.6% in early trading after its chief executive resigned \
unexpectedly; analysts had predicted quarterly earnings of 1.2 billion. The government declined \
to comment, although a spokeswoman said that "all options remain on the table" and that a \
decision would follow next week.
"""
