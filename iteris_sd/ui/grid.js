// A grid of pictures: filled as they come, sorted and filtered here, enlarged on a click. What it shows is `props.value`:
// { name, columns: [{id, title}], rows: [{id, title}], measures: [{id, title}], main: [id],
//   cells: { "row|column": {url, title, alt, scores, flagged} }, previews: { "row|column": url } }
const root = element.querySelector('.grid');
const add = (parent, kind, name, text) => {
  const node = document.createElement(kind);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
const fixed = (value, digits) => value.toFixed(digits).replace(/^-(0\.0*)$/, '$1');  // no minus before a zero
const number = (value) => (typeof value === 'number' ? fixed(value, 2) : '–');
const key = (row, column) => `${row}|${column}`;
let order = '', hidden = new Set(), shape = '', places = new Map();
const data = () => props.value || { columns: [], rows: [], measures: [], main: [], cells: {}, previews: {} };
const shown = () => data().columns.filter((column) => !hidden.has(column.id));

// ------------------------------------------------------------ one picture, large
const dialog = add(root, 'dialog', 'enlarged');
dialog.setAttribute('aria-label', 'Picture');
const large = add(dialog, 'img');
const words = add(dialog, 'div', 'words');
let at = '';
const keys = () => [...places.keys()].filter((place) => data().cells[place]);
const enlarge = (place) => {
  const cell = data().cells[place];
  at = place;
  large.src = cell.url;
  large.alt = cell.alt;
  words.replaceChildren();
  add(words, 'p', 'what', cell.title);
  const table = add(words, 'dl');
  for (const measure of data().measures) {
    if (typeof cell.scores[measure.id] !== 'number') continue;
    add(table, 'dt', '', measure.title);
    add(table, 'dd', '', fixed(cell.scores[measure.id], 3));
  }
  const bar = add(words, 'div', 'bar');
  const button = (label, act) => {
    const node = add(bar, 'button', '', label);
    node.type = 'button';
    node.addEventListener('click', act);
  };
  button('Previous', () => step(-1));
  button('Next', () => step(1));
  const file = add(bar, 'a', '', 'Open the file');
  Object.assign(file, { href: cell.url, target: '_blank', rel: 'noopener' });
  button('Close', () => dialog.close());
  if (!dialog.open) dialog.showModal();
};
const step = (by) => {
  const all = keys();
  enlarge(all[(all.indexOf(at) + by + all.length) % all.length]);
};
dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener('keydown', (event) => {
  if (event.key === 'ArrowLeft') step(-1);
  if (event.key === 'ArrowRight') step(1);
});

// ------------------------------------------------------------ what is shown, and in which order
const tools = add(root, 'div', 'tools');
const stage = add(root, 'div', 'stage');
const buildTools = () => {
  tools.replaceChildren();
  tools.hidden = !data().columns.length;
  const label = add(tools, 'label', '', 'Order ');
  const select = add(label, 'select');
  add(select, 'option', '', 'As a grid').value = '';
  for (const measure of data().measures.filter((m) => data().main.includes(m.id))) {
    add(select, 'option', '', `${measure.title}, best first`).value = measure.id;
  }
  if (![...select.options].some((option) => option.value === order)) order = '';
  select.value = order;
  select.addEventListener('change', () => { order = select.value; shape = ''; show(); });
  if (data().columns.length < 2) return;
  const set = add(tools, 'fieldset');
  add(set, 'legend', '', 'Show');
  for (const column of data().columns) {
    const line = add(set, 'label'), box = add(line, 'input');
    box.type = 'checkbox';
    box.checked = !hidden.has(column.id);
    line.append(column.title);
    box.addEventListener('change', () => {
      if (box.checked) hidden.delete(column.id);
      else if (shown().length > 1) hidden.add(column.id);
      else box.checked = true;
      shape = '';
      show();
    });
  }
};

// ------------------------------------------------------------ the pictures
const fill = (place) => {
  const box = places.get(place), cell = data().cells[place], preview = (data().previews || {})[place];
  const wanted = cell ? cell.url : preview || '';
  if (box.dataset.shows === wanted && box.firstChild) return;
  box.dataset.shows = wanted;
  box.replaceChildren();
  if (!cell) {
    const pending = add(box, preview ? 'img' : 'div', 'pending');
    if (preview) Object.assign(pending, { src: preview, alt: 'Preview of a picture that is being drawn' });
    return;
  }
  const figure = add(box, 'figure'), button = add(figure, 'button', 'enlarge');
  button.type = 'button';
  const image = add(button, 'img');
  Object.assign(image, { src: cell.url, alt: cell.alt, title: 'Enlarge' });
  button.addEventListener('click', () => enlarge(place));
  const caption = add(figure, 'figcaption');
  add(caption, 'b', '', cell.title);
  const main = data().measures.filter((m) => data().main.includes(m.id));
  const taken = main.filter((m) => typeof cell.scores[m.id] === 'number');
  for (const measure of taken.length ? taken : main) {
    add(caption, 'span', '', `${measure.short} ${number(cell.scores[measure.id])}`);
  }
  if (cell.flagged) add(caption, 'span', 'flagged', 'blanked by the safety checker, or its numbers overflowed; not scored');
};
const asGrid = () => {
  const wide = add(stage, 'div', 'wide'), table = add(wide, 'table', 'pictures');
  table.style.setProperty('--columns', shown().length);
  const head = add(add(table, 'thead'), 'tr');
  add(head, 'td');
  for (const column of shown()) add(head, 'th', '', column.title).scope = 'col';
  const body = add(table, 'tbody');
  for (const row of data().rows) {
    const line = add(body, 'tr'), name = add(line, 'th');
    name.scope = 'row';
    if (row.kind) add(name, 'span', '', `${row.kind} `);
    name.append(row.title);
    for (const column of shown()) places.set(key(row.id, column.id), add(line, 'td'));
  }
};
const asList = () => {
  const list = add(stage, 'div', 'sorted'), score = (place) => (data().cells[place] || { scores: {} }).scores[order];
  const all = data().rows.flatMap((row) => shown().map((column) => key(row.id, column.id)));
  const scored = all.filter((place) => typeof score(place) === 'number').sort((a, b) => score(b) - score(a));
  for (const place of scored) places.set(place, add(list, 'div'));
};
const show = () => {
  const now = JSON.stringify([data().name, data().columns, data().rows, data().measures]);
  const done = order ? Object.keys(data().cells).length : 0; // a sorted list is built anew for every picture
  if (shape !== `${now} ${done}`) {
    if (!shape.startsWith(now)) {
      hidden = new Set([...hidden].filter((id) => data().columns.some((column) => column.id === id)));
      if (!shown().length) hidden.clear();
      buildTools();
    }
    shape = `${now} ${done}`;
    places = new Map();
    stage.replaceChildren();
    if (data().columns.length) (order ? asList : asGrid)();
  }
  for (const place of places.keys()) fill(place);
};
watch('value', show);
show();
