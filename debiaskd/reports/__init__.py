"""Pages that stand alone: HTML with its images inside, which loads nothing from elsewhere.

page.py         from a template to a page; base.html.j2 (style), drawings.html.j2 (charts, images)
charts.py       scales, ticks and points of charts
differences.py  what recipes differ in
measured.py     one finished run: figures, logs, where it looks
sections.py     runs that were measured on the same images: entries, tables
curves.py       and their charts
comparison.py   several runs: `debiaskd report`
summary.py      mean and spread over seeds
gallery.py      attribution maps drawn over images
quickstart.py   the quickstart's table, claims and page
"""
