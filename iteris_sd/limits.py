"""Every bound on input, in one place, with its reason."""

# LoRA and embedding files
MAX_FILE_BYTES = (
    2 * 1024**3
)  # the largest honest LoRA (rank 256, fp32, every layer of SD v1.5) is near 1.5 GB
MAX_HEADER_BYTES = 16 * 1024**2  # a header of 10,000 tensors takes 2 MB; more is a corrupt length field
MAX_TENSORS = 20_000  # SD v1.5 has about 400 adaptable layers, three tensors each
MAX_RANK = 1024  # above it the "low rank" factors outweigh the SD v1.5 layers that they adapt
MAX_UNFOLDED = 2**28  # numbers that a file's Tucker cores stand for: all convolutions of SD v1.5 at rank 512
MAX_WIDTH = 65_536  # no text-to-image layer is wider; keeps a forged shape from asking for all memory
MAX_EMBEDDING_BYTES = 16 * 1024**2  # 64 vectors of 2048 numbers in float64 take 1 MB
MAX_TOKEN_VECTORS = 64  # the text encoder sees 77 positions
MAX_CONFIG_BYTES = 1024**2  # PEFT settings that list every layer of a U-Net take a tenth of it
MAX_TOKENS = 64  # learned tokens in one file; pivotal tuning uses two or three
MAX_TOKEN_CHARS = 128  # a learned token is one word of a prompt

# The page
MAX_WAITING = 32  # requests in the queue; more would wait longer than anybody does
GRACE_SECONDS = 10  # that a page may be without a connection before its work is stopped and its files go
MAX_VISITS = 256  # open at once; each may have files
FAIR_IDLE_SECONDS = 1800  # of a visit that has concepts or pictures: before that no newcomer takes its place
MAX_SESSIONS = 512  # whose widgets Gradio remembers, half a megabyte each: all visits, and some that ended
MAX_REQUEST_BYTES = 128 * 1024  # but for uploads: a form takes 1 kB, forty files with the longest names 70
MAX_CALLS = 8  # of programs at once, so that pages are not kept waiting by them alone
MAX_KEPT_CALLS = 8  # of one program: what came of earlier ones goes, fetched or not
MAX_PACKED_LORAS = (
    8  # zips of one composition: one for each method; the oldest goes, and is packed anew if wanted
)
MAX_IDLE_SECONDS = (
    6 * 3600
)  # of a visit whose page was not seen to close, as programs' never are; then its files go
MAX_PUBLIC_PICTURES = 32  # of one composition on a public page: minutes of a shared GPU
MAX_PUBLIC_STEPS = 50  # denoising steps there
MAX_PUBLIC_WORK = 400  # steps of all pictures there, counted at 512 px: 16 pictures, minutes of two cores
MAX_PUBLIC_PASSES = 4000  # of calibration samples there, likewise: six concepts with the usual 50 each
MAX_PUBLIC_AT_ONCE = 4  # compositions and the like there, from one address: four people behind one router
MAX_GPU_SECONDS = 120  # of a lent GPU that one composition may ask for; strangers are lent as much in a day

# Base models
MAX_CHECKPOINT_BYTES = 16 * 1024**3  # SD v1.5 with its EMA in fp32 is 8 GB

# Merging
MAX_ITERATIONS = 64  # SD v1.5's text encoder needs 25 to converge; the paper caps at 20
MAX_REMEMBERED_BYTES = 1024**3  # merges and samples kept for the next time: a few large ones, many small ones
MAX_FRONTIER_BYTES = 4 * 1024**3  # what waiting micro-batches may hold in memory; the rest goes to disk
MAX_MOMENT_BYTES = (
    4 * 1024**3
)  # of layers measured in one pass; SD v1.5 whole would take fifteen times as much
MAX_COEFFICIENT = 1e3  # a larger ratio silences the other concepts altogether

ROUGH_ALPHA = 1e-5  # from here on a regularisation is a hundred times the rounding of a float32 Gram matrix

# Recipes
MAX_CONCEPTS = 6  # the captions of more do not fit a picture, and moments grow with their number
MAX_SEEDS = 16  # rows of the grid; more than a screen shows
MAX_SEED = 2**32 - 1  # what every random generator in use accepts
MAX_METHODS = 8  # columns of the grid
MAX_PICTURES = 64  # seeds times methods: minutes of work on two cores
MAX_STEPS = 100  # the paper's own number; more shows no gain
MAX_LCM_STEPS = 50  # an LCM-LoRA was distilled from so many
MAX_GUIDANCE = 20.0  # beyond it pictures burn out
MAX_STRENGTH = 2.0  # a merged adapter drawn more strongly than this breaks the base model
MAX_WEIGHT = 4.0  # a LoRA applied more strongly than this breaks the base model
MAX_PROMPT_CHARS = 1000  # 77 tokens are read; a thousand characters hold several times as many
MAX_PROMPT_WEIGHT = 4.0  # words weighed more than this push the text states out of what the U-Net knows
MAX_BREAKS = 8  # every further piece costs as much attention as a whole prompt
MAX_CLIP_SKIP = 4  # the last quarter of the text encoder; models were trained on its end, or the layer before
MIN_SIZE, MAX_SIZE = 64, 1024  # pixels; SD v1.5 repeats its subjects above 768
MAX_SAMPLES = 256  # calibration samples per concept; the paper takes 50
MIN_TOKENS_PER_SAMPLE = 77  # of a text all positions count, as in the paper
MAX_TRAJECTORY_STEPS = 50  # denoising steps that calibration samples are taken from
MAX_RECIPE_BYTES = 256 * 1024  # a recipe is a page of text

# Concepts
MAX_REFERENCES = 10  # reference pictures per concept
MAX_PICTURE_PIXELS = 64 * 1024**2  # a large photograph; more is a decompression bomb
MAX_NAME_CHARS = 64  # of a concept's name, trigger and class noun
MAX_REMARK_CHARS = 1000  # of a concept's description, licence and source: a paragraph each
MAX_CONCEPT_BYTES = 256 * 1024  # concept.json is a page of text
MAX_EMBEDDINGS = 32  # learned tokens of one concept, or files of them; pivotal tuning uses two or three
MAX_REFERENCE_SIDE = 1024  # pixels that a kept picture is shrunk to; scorers look at 224
MAX_ZIP_ENTRIES = 64  # a concept with all its tokens and pictures has fewer
MAX_ZIP_READ_BYTES = 1024**2  # of a zip at once; its list of entries takes 10 kB, but is as long as it says
MAX_ZIP_RATIO = (
    100  # a zip may unpack to so many times its size; weights and pictures hardly shrink, text tenfold
)

# Training
MAX_PHOTOS = 100  # of one concept; a handful is usual, and all are held in memory

# History
MAX_HISTORY = 200  # compositions that are kept; nobody scrolls through more
MAX_HISTORY_BYTES = 2 * 1024**3  # two hundred compositions of a dozen pictures of 512 px
MAX_PUBLIC_HISTORY = 20  # compositions of a visitor of a public page, which go with the visit
MAX_PUBLIC_HISTORY_BYTES = 128 * 1024**2  # of those: ten of the largest that are drawn there, at 512 px
MAX_UNFINISHED_SECONDS = 3600  # copying a composition takes seconds; what is older was left by a crash
MAX_ENTRY_BYTES = 64 * 1024  # entry.json is a few lines, and the names of 64 pictures
MAX_SCORES_BYTES = 4 * 1024**2  # 64 pictures with the longest prompts take half a megabyte
MAX_THUMBNAIL_SIDE = 320  # pixels; as wide as a card on the page
MAX_TITLE_CHARS = 200  # of a composition's prompt, and of its concepts' names, in a list: two lines

# Recipes out of links and pictures
MAX_QUERY_CHARS = 16 * 1024  # two prompts of the most characters, four bytes each, take 11 kB
MAX_DRAWN_BYTES = 32 * 1024**2  # a picture of 1024 px takes 4 MB with all it says
MAX_TOLD_CHARS = 300  # of a complaint that repeats what a stranger wrote; a sentence takes no more

# Headers and settings of LoRA files
MAX_KEY_CHARS = 256  # of a tensor's name; the longest of a U-Net's layers has 130, with every prefix in use
MAX_DIMENSIONS = 8  # of a tensor; a convolution has four
MAX_ALPHA_PATTERNS = 1024  # of PEFT's settings; tools write one per layer, of which SD v1.5 has about 400
MAX_PATTERN_CHARS = 256  # of one of them; none is longer than the name of a layer
MAX_PATTERN_WORK = 2_000_000  # their characters times layers: a second; 80 of 60 for 400 layers

# What people bring
MAX_BROUGHT = 40  # files at once: a LoRA, its settings, and as many tokens as a concept may have
MAX_PUBLIC_CONCEPTS = 12  # that a visitor of a public page may have brought: twice as many as a picture takes
MAX_PUBLIC_FILE_BYTES = 512 * 1024**2  # of one there; every layer at rank 128 in halves takes 400 MB
MAX_PUBLIC_BYTES = 1024**3  # of all that such a visitor has brought
MAX_PUBLIC_BYTES_IN_ALL = 16 * 1024**3  # of all visitors; a free Space has 50 GB, for models, too
MAX_PUBLIC_UPLOAD_SECONDS = (
    3600  # that Gradio keeps a file there which was uploaded or handed out for download
)
MIN_PUBLIC_FREE_BYTES = 2 * 1024**3  # of a disk there, below which nothing is uploaded: pictures need some
MAX_UPLOAD_BYTES = 3 * 1024**3  # of one upload on one's own page: the largest LoRA, and forty files of tokens
MAX_STRAY_SECONDS = 3600  # that nothing came of an upload in part; it was left by a crash or a refusal
