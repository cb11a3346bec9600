// Pictures dropped anywhere on the page, where nothing else takes files: uploaded, and told as `path`.
const carries = (event) => [...((event.dataTransfer || {}).types || [])].includes('Files');
document.addEventListener('dragover', (event) => { if (carries(event)) event.preventDefault(); });
document.addEventListener('drop', async (event) => {
  const file = [...((event.dataTransfer || {}).files || [])].find((one) => /\.(png|json)$/i.test(one.name));
  if (!file || event.target.closest('.drop')) return;
  event.preventDefault();
  const { path } = await upload(file);
  trigger('upload', { path });
});
