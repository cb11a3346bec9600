// Pictures dropped anywhere on the page, where nothing else takes files: uploaded, and told as `path`. Other files are
// kept from opening in place of the page.
const carries = (event) => [...((event.dataTransfer || {}).types || [])].includes('Files');
const elsewhere = (event) => {
  const node = event.target instanceof Element ? event.target : event.target.parentElement;
  return node && node.closest('.drop');
};
document.addEventListener('dragover', (event) => { if (carries(event)) event.preventDefault(); });
document.addEventListener('drop', async (event) => {
  if (!carries(event) || elsewhere(event)) return;
  event.preventDefault();
  const file = [...event.dataTransfer.files].find((one) => /\.(png|json)$/i.test(one.name));
  if (!file) return;
  try {
    const { path } = await upload(file);
    trigger('upload', { path });
  } catch {
    trigger('upload', { path: '' });
  }
});
