"""The judge: a folder of real scans and one or more of synthetic ones in, one page and one report.json out.

evaluate        the verb: reads both sides, calls the rest, writes the report
cohort          who is on which side; refuses a patient that is on both
sides           the real side, the synthetic sets and the anchors, read and measured
anchors         real scans spoilt in known ways, judged as if they were synthetic
grid            both sides on one grid; where the body is
summary         what one scan leaves behind: a few thousand numbers
features        two feature spaces by formula, texture and layout
network         the third, learned from real CT without labels; its weights and their card lie beside it
medicalnet      a fourth, for those who have the weights
similarity      PSNR, SSIM, MS-SSIM of two volumes
reconstruction  how much of a scan survives an autoencoder
distances       Frechet and kernel distance, precision, recall, density, coverage, classifier two-sample test
handedness      are left and right as in real scans
realism         every measure with its real-against-real floor and its interval
memorization    are there copies of training scans
outliers        single scans that stand out
ranking         several synthetic sets, nearest to real first
verdict         all of it in words
gallery         what the page shows: pictures, curves, quiz, volumes
charts, page    the page; niivue.umd.js is its viewer
appendix        the report as Markdown
"""
