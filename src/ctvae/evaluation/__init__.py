"""The judge: a folder of real scans and a folder of synthetic ones in, one page and one report.json out.

evaluate        the verb: reads both sides, calls the rest, writes the report
cohort          who is on which side; refuses a patient that is on both
grid            both sides on one grid; where the body is
summary         what one scan leaves behind: a few thousand numbers
features        the two feature spaces, texture and layout
similarity      PSNR, SSIM, MS-SSIM of two volumes
reconstruction  how much of a scan survives an autoencoder
distances       Frechet and kernel distance, precision, recall, density, coverage, classifier two-sample test
realism         every measure with its real-against-real floor and its interval
memorization    are there copies of training scans
charts, page    the page
"""
