// The search would take the dashes of --rank as a sign to leave out the pages that have the word.
{
  const box = document.querySelector(".md-search__input");
  const { get, set } = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value");
  const typed = () => get.call(box).replace(/(^|\s)-+(?=\w)/g, "$1");
  Object.defineProperty(box, "value", { get: typed, set });
}
