# %% [markdown]
# # Read the tables
#
# Rows of `gdn table` as Python objects: the paper's numbers, ours from the runs below this directory and from the
# results that came with the package, what marks a number, what it came from.

# %%
import matplotlib.pyplot as plt

from experiments import tables

rows = tables.rows("table3", "tiny")
for row in rows:
    print(f"{row['model']:18} held-out {row['ours']['held_out_ppl']}  PIQA {row['ours']['piqa']}  from {row['from']}")

# %% [markdown]
# Held-out perplexity per byte of the small runs: the same novels, the same recipe, ten models.

# %%
measured = [row for row in rows if row["ours"]["held_out_ppl"] != tables.NOT_RUN]
measured.sort(key=lambda row: row["ours"]["held_out_ppl"])
origin = f"the ten tiny runs of table3 ({'; '.join(sorted({row['from'] for row in measured}))})"
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
axes.barh([row["model"] for row in measured], [row["ours"]["held_out_ppl"] for row in measured])
axes.invert_yaxis()
axes.set(xlabel="perplexity per byte of held-out text", title="table3 at tiny: a stand-in, not the paper's measure")
plt.show()

# %% [markdown]
# The paper's own numbers at 1.3B: LAMBADA accuracy against Wiki perplexity.

# %%
origin = "the paper, arXiv 2412.06464"
paper = {row["model"]: row["paper"] for row in tables.rows("table3", "1.3b")}
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for model, numbers in paper.items():
    axes.scatter(numbers["wiki_ppl"], numbers["lambada_acc"], color="tab:blue")
    axes.annotate(
        model, (numbers["wiki_ppl"], numbers["lambada_acc"]), fontsize=8, xytext=(4, 2), textcoords="offset points"
    )
axes.set(xlabel="Wiki perplexity (lower is better)", ylabel="LAMBADA accuracy (%)", title="The paper's Table 3")
plt.show()
assert len(paper) == 10
